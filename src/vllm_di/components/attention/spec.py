"""Limits of all attention backends here."""

from __future__ import annotations

from vllm_di.components.interfaces import AttentionBackend, AttentionSpec, KvLayout
from vllm_di.errors import ConfigError


def check_layout(backend: AttentionBackend, kv_layout: KvLayout) -> None:
    """Raise ConfigError for a layout, or a block size, that ``backend`` does not read."""
    if not {"*", kv_layout.name} & {*backend.layouts}:
        raise ConfigError(
            f"{type(backend).__name__} reads the layouts {', '.join(backend.layouts)}, not "
            f"{kv_layout.name!r}; take kv_layout={backend.layouts[0]}, or sdpa here, which reads "
            "any"
        )
    check_block_size(backend, kv_layout)


def check_block_size(backend: AttentionBackend, kv_layout: KvLayout) -> None:
    """Raise ConfigError for a block size that ``backend`` does not read."""
    size, sizes = kv_layout.block_size, backend.block_sizes
    if sizes and size not in sizes:
        raise ConfigError(
            f"{type(backend).__name__} reads blocks of {', '.join(map(str, sizes))} tokens, not "
            f"{size}; take auto, or attention=sdpa, which reads any",
            key="kv_layout.block_size",
        )


def check_spec(spec: AttentionSpec) -> None:
    """Raise ConfigError for a layer that makes no sense: heads that cannot share the kv heads
    evenly, a window or soft cap that sees nothing."""
    if spec.num_kv_heads < 1 or spec.num_heads % spec.num_kv_heads:
        raise ConfigError(
            f"{spec.num_heads} attention heads cannot share {spec.num_kv_heads} kv heads evenly; "
            "num_attention_heads must be a multiple of num_key_value_heads"
        )
    if spec.head_size < 1:
        raise ConfigError(f"head size {spec.head_size}: must be 1 or more")
    if spec.window is not None and spec.window < 1:
        raise ConfigError(f"sliding window {spec.window}: must be 1 or more; leave it out for none")
    if spec.soft_cap is not None and not spec.soft_cap > 0:
        raise ConfigError(f"soft cap {spec.soft_cap}: must be above 0; leave it out for none")


def check_attention(backend: AttentionBackend, spec: AttentionSpec) -> None:
    """``backend.check(spec)`` for a model that holds the backend: a refusal is about the slot
    ``attention``, whoever asks."""
    try:
        backend.check(spec)
    except ConfigError as error:
        raise type(error)(str(error), key=error.key or "attention") from error
