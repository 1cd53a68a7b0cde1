"""Limits of all attention backends here."""

from __future__ import annotations

from vllm_di.components.interfaces import AttentionSpec
from vllm_di.errors import ConfigError


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
