"""Our attention behind transformers' attention interface: a step's state goes through the model's
layers as a keyword."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional

from vllm_di.components.interfaces import AttentionSpec
from vllm_di.errors import UnsupportedModelError

NAME = "vllm_di"
"""Of our attention among transformers' implementations."""
STEP = "vllm_di_step"
"""The keyword under which a step's state reaches attention."""


class Attends(Protocol):
    """The part of an AttentionBackend that a step needs."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        """q, k, v [tokens, heads, head_size] -> [tokens, heads, head_size]."""


@dataclass(slots=True)
class Step:
    """What the attention of each layer needs of the step that runs."""

    backend: Attends
    caches: Sequence[Any]  # of each layer
    metadata: Sequence[Any]  # of each layer


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query [1, heads, tokens, head_size] -> [1, tokens, heads,
    size of a value]. Where keys and values of a head differ in size, as in MLA, zeros fill the
    smaller ones: they change neither scores nor sums. Raises UnsupportedModelError for what our
    attention does not do."""
    step = kwargs.get(STEP)
    if not isinstance(step, Step):
        raise UnsupportedModelError("its layers do not hand their keywords on to attention")
    spec = spec_of(module, query, key, value, kwargs)
    q, k, v = (_filled(x[0].transpose(0, 1), spec.head_size) for x in (query, key, value))
    cache = step.caches[module.layer_idx]
    metadata = step.metadata[module.layer_idx]
    out = step.backend.forward(q, k, v, cache, metadata, spec)
    return out[None, ..., : value.shape[-1]], None


def _filled(x: Tensor, size: int) -> Tensor:
    """x [tokens, heads, elements] with zeros up to ``size`` elements."""
    return functional.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x.contiguous()


def spec_of(
    module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> AttentionSpec:
    """The attention that one call needs. Raises UnsupportedModelError for a feature that no
    backend has."""
    sinks = kwargs.get("s_aux")
    if sinks is not None and sinks.numel() != query.shape[1]:
        raise UnsupportedModelError(
            f"its attention has sinks of shape {list(sinks.shape)} for {query.shape[1]} heads"
        )
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{type(module).__name__} is not causal")
    if key.shape[:-1] != value.shape[:-1]:
        raise UnsupportedModelError(
            f"keys of shape {list(key.shape)} stand beside values of {list(value.shape)}"
        )
    scaling = kwargs.get("scaling")
    return AttentionSpec(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_size=max(query.shape[3], value.shape[3]),
        scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        window=kwargs.get("sliding_window"),
        soft_cap=kwargs.get("softcap"),
        sinks=None if sinks is None else sinks.flatten(),
    )
