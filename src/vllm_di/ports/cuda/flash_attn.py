"""Attention by the package flash-attn (2.x), straight on the block table."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vllm_di.components.attention.spec import check_layout, check_spec
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    KvLayout,
    LayerCache,
    OpTable,
)
from vllm_di.errors import ConfigError
from vllm_di.ports.cuda.packages import needed

PAGE = 256
"""flash-attn reads blocks of a multiple of so many tokens."""
LARGEST_HEAD = 256


class FlashAttention(AttentionBackend):
    """``flash_attn_varlen_func`` for every batch. fp16 and bf16. Steps are not captured as graphs:
    the longest context is an argument of the call."""

    layouts = ("hnd",)
    block_sizes = range(PAGE, 1025, PAGE)

    def __init__(self, ops: OpTable, kv_layout: KvLayout) -> None:
        check_layout(self, kv_layout)
        package = needed("flash_attn", "attention=flash_attn", "pip install flash-attn")
        self._attend, self._write = package.flash_attn_varlen_func, ops.write_kv

    def check(self, spec: AttentionSpec) -> None:
        check_spec(spec)
        if spec.head_size > LARGEST_HEAD or spec.head_size % 8:
            raise ConfigError(
                f"attention=flash_attn has head sizes that are multiples of 8 up to "
                f"{LARGEST_HEAD}, not {spec.head_size}; choose attention=triton"
            )

    def build(self, batch: BatchPlan, out: Any | None = None) -> tuple[BatchPlan, Tensor]:
        """-> (the plan, contexts as cumulative lengths [seqs + 1] int32)."""
        lengths = batch.seq_lens.new_zeros(len(batch.seq_lens) + 1)
        lengths[1:] = batch.seq_lens.cumsum(0)
        return batch, lengths

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        plan: BatchPlan = metadata[0]
        self._write(k, v, cache.key, cache.value, plan.slot_mapping)
        total = sum(plan.query_lens_host)
        out = self._attend(
            q[:total],
            cache.key.transpose(1, 2),  # [blocks, block_size, kv_heads, head_size]
            cache.value.transpose(1, 2),
            cu_seqlens_q=plan.query_start,
            cu_seqlens_k=metadata[1],
            max_seqlen_q=plan.max_query_len,
            max_seqlen_k=plan.max_seq_len,
            softmax_scale=spec.scale,
            causal=True,
            window_size=(-1, -1) if spec.window is None else (spec.window - 1, 0),
            softcap=spec.soft_cap or 0.0,
            block_table=plan.block_table,
        )
        if total == len(q):
            return out  # type: ignore[no-any-return]
        whole = q.new_zeros(q.shape)
        whole[:total] = out
        return whole
