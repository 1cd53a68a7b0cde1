"""The KV cache as attention sees it while a step is traced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_di.components.interfaces import LayerCache


@dataclass(slots=True)
class TracedCache(LayerCache):
    """A layer's cache before the step."""

    new: tuple[Tensor, Tensor] | None = None
    """Keys and values of the step, [tokens, kv_heads, head_size], where attention leaves it to the
    program to write them; None where a node of the graph writes."""
