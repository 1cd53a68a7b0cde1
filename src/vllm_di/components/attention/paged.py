"""Attention straight on the block table, through the op table."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from torch import Tensor

from vllm_di.components.attention.spec import check_layout, check_spec
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    KvLayout,
    LayerCache,
    OpTable,
    UnrotatedForward,
)

log = logging.getLogger(__name__)


class PagedAttention(AttentionBackend):
    """``ops.write_kv`` and ``ops.paged_attention``: no gathered copy of keys and values is made.

    Where ``ops.rotary_write_kv`` is in force it rotates too, unless a subclass has a ``forward`` of
    its own, which then runs.
    """

    layouts = ("hnd",)
    reuses = frozenset({"record", "capture"})
    rotates: ClassVar[bool] = True
    """Whether it may rotate queries and keys itself. A subclass with a ``forward`` of its own does
    not, unless it says so: ``forward`` would not see them."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "forward" in cls.__dict__ and "rotates" not in cls.__dict__:
            cls.rotates = False

    def __init__(self, ops: OpTable, kv_layout: KvLayout) -> None:
        check_layout(self, kv_layout)
        self._write, self._attend = ops.write_kv, ops.paged_attention
        self._rotary_write = ops.rotary_write_kv
        self._fused = "rotary_write_kv" in ops.fusions
        for op in ("write_kv", "paged_attention"):
            if (owner := ops.library_of(op)) is not None and op in owner.asks_host:
                log.info("attention cannot be captured: ops.%s asks the host", op)
                self.reuses -= {"capture"}

    def check(self, spec: AttentionSpec) -> None:
        check_spec(spec)

    def build(self, batch: BatchPlan, out: Any | None = None) -> BatchPlan:
        return batch

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        plan: BatchPlan = metadata
        self._write(k, v, cache.key, cache.value, plan.slot_mapping)
        return self._attention(q, cache, plan, spec)

    def unrotated(self) -> UnrotatedForward | None:
        return self._forward_unrotated if self._fused and self.rotates else None

    def _forward_unrotated(
        self,
        positions: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        cache: LayerCache,
        metadata: Any,
        spec: AttentionSpec,
    ) -> Tensor:
        plan: BatchPlan = metadata
        q = self._rotary_write(
            positions, q, k, v, cos_sin, False, cache.key, cache.value, plan.slot_mapping
        )
        return self._attention(q, cache, plan, spec)

    def _attention(
        self, q: Tensor, cache: LayerCache, plan: BatchPlan, spec: AttentionSpec
    ) -> Tensor:
        return self._attend(
            q,
            cache.key,
            cache.value,
            plan.query_start,
            plan.seq_lens,
            plan.block_table,
            spec.scale,
            spec.window,
            spec.soft_cap,
        )
