"""Attention by the package flashinfer-python, straight on the block table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.attention.spec import check_layout, check_spec
from vllm_di.components.device.sizes import parse_size
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    Device,
    KvLayout,
    LayerCache,
    OpTable,
)
from vllm_di.errors import ConfigError
from vllm_di.ports.cuda.packages import needed

HEADS = (64, 128, 256)


@dataclass(slots=True)
class Pages:
    """A step's block table as flashinfer wants it, and the wrappers that are ready for it."""

    plan: BatchPlan
    starts: Tensor  # [seqs + 1] int32, cumulative blocks
    indices: Tensor  # [starts[-1]] int32, blocks of all sequences
    last_lens: Tensor  # [seqs] int32, tokens in each last block
    planned: dict[tuple[AttentionSpec, torch.dtype], Any] = field(default_factory=dict)


class FlashInferAttention(AttentionBackend):
    """``BatchPrefillWithPagedKVCacheWrapper`` for every batch; one wrapper for each kind of layer,
    planned once a step. fp16 and bf16. Steps are not captured as graphs: a plan needs the host."""

    layouts = ("hnd",)

    def __init__(
        self, device: Device, ops: OpTable, kv_layout: KvLayout, *, workspace: str | int
    ) -> None:
        check_layout(self, kv_layout)
        size = parse_size(workspace, "workspace")
        package = needed("flashinfer", "attention=flashinfer", "pip install flashinfer-python")
        self._wrapper = package.BatchPrefillWithPagedKVCacheWrapper
        self._write, self._block_size = ops.write_kv, kv_layout.block_size
        self._workspace = device.zeros((size,), torch.uint8)
        self._wrappers: dict[tuple[AttentionSpec, torch.dtype], Any] = {}

    def check(self, spec: AttentionSpec) -> None:
        check_spec(spec)
        if spec.head_size not in HEADS:
            raise ConfigError(
                f"attention=flashinfer has the head sizes {', '.join(map(str, HEADS))}, not "
                f"{spec.head_size}; choose attention=triton"
            )

    def build(self, batch: BatchPlan, out: Any | None = None) -> Pages:
        size = self._block_size
        lengths = torch.tensor(batch.seq_lens_host, dtype=torch.int32)
        blocks = (lengths + size - 1) // size
        starts = torch.zeros(len(blocks) + 1, dtype=torch.int32)
        starts[1:] = blocks.cumsum(0)
        columns = torch.arange(batch.block_table.shape[1], dtype=torch.int32)
        used = columns < blocks[:, None]
        place = used.flatten().nonzero()[:, 0].to(batch.block_table.device, non_blocking=True)
        return Pages(
            plan=batch,
            starts=starts,
            indices=batch.block_table.flatten()[place],
            last_lens=lengths - (blocks - 1) * size,
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        pages: Pages = metadata
        self._write(k, v, cache.key, cache.value, pages.plan.slot_mapping)
        key = spec, q.dtype
        if key not in pages.planned:
            pages.planned[key] = self._plan(pages, spec, q.dtype, cache.key.dtype)
        total = sum(pages.plan.query_lens_host)
        out = pages.planned[key].run(q[:total], (cache.key, cache.value))
        if total == len(q):
            return out  # type: ignore[no-any-return]
        whole = q.new_zeros(q.shape)
        whole[:total] = out
        return whole

    def close(self) -> None:
        self._wrappers.clear()

    def _plan(
        self, pages: Pages, spec: AttentionSpec, dtype: torch.dtype, kv_dtype: torch.dtype
    ) -> Any:
        key = spec, dtype
        if key not in self._wrappers:
            self._wrappers[key] = self._wrapper(self._workspace, kv_layout="HND")
        wrapper = self._wrappers[key]
        queries = torch.zeros(len(pages.starts), dtype=torch.int32)
        queries[1:] = torch.tensor(pages.plan.query_lens_host, dtype=torch.int32).cumsum(0)
        wrapper.plan(
            queries,
            pages.starts,
            pages.indices,
            pages.last_lens,
            num_qo_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim_qk=spec.head_size,
            page_size=self._block_size,
            causal=True,
            sm_scale=spec.scale,
            window_left=-1 if spec.window is None else spec.window - 1,
            logits_soft_cap=spec.soft_cap,
            q_data_type=dtype,
            kv_data_type=kv_dtype,
        )
        return wrapper
