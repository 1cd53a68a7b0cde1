"""The reference attention: gather a sequence's keys and values, then torch's scaled dot product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_di.components.attention.spec import check_spec
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    KvLayout,
    LayerCache,
)
from vllm_di.components.ops.torch import attend


class SdpaAttention(AttentionBackend):
    """One sequence at a time, on any KV layout: it reads and writes through the layout alone."""

    layouts = ("*",)
    """Any."""

    def __init__(self, kv_layout: KvLayout) -> None:
        self._layout = kv_layout

    def check(self, spec: AttentionSpec) -> None:
        check_spec(spec)

    def build(self, batch: BatchPlan, out: Any | None = None) -> BatchPlan:
        return batch

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        plan: BatchPlan = metadata
        self._layout.write(cache, k, v, plan.slot_mapping)
        out = torch.zeros_like(q)
        start = 0
        for row, (queries, length) in enumerate(
            zip(plan.query_lens_host, plan.seq_lens_host, strict=True)
        ):
            keys, values = self._layout.gather(cache, plan.block_table[row], length)
            out[start : start + queries] = attend(
                q[start : start + queries],
                keys.transpose(0, 1),
                values.transpose(0, 1),
                spec.scale,
                spec.window,
                spec.soft_cap,
            )
            start += queries
        return out

    def export(self) -> Any:
        """The function that a compiled program puts at an attention node."""
        return attend
