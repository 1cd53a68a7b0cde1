"""Attention by the vendor's kernels, over a cache of [blocks, block_size, kv_heads, head_size]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.attention.spec import check_layout, check_spec
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    Device,
    KvLayout,
    LayerCache,
)
from vllm_di.errors import ConfigError
from vllm_di.ports.ascend.vendor import require

BLOCK_MULTIPLE, LARGEST_BLOCK = 128, 512
"""Tokens in a block that the fused kernel takes."""
PACKED_HEAD_SIZES = (128, 192)
"""Head sizes for which it takes sequences packed one after another (its layout TND)."""
HEAD_MULTIPLE, LARGEST_HEAD = 16, 256
LARGEST_GROUP = 64
"""Query heads that may share a kv head."""
MASK_SIZE = 2048
"""Rows of the triangle from which the kernel takes its causal mask, however long the sequence."""
CAUSAL = 3
"""Its sparse mode for a causal mask that ends in the lower right corner."""

Issue = Callable[[list[int]], None]
"""Submits one attention kernel, with the sequences' lengths: a graph does so again and again."""


@dataclass(slots=True)
class Metadata:
    """One step, as the kernels want it."""

    written: Tensor | None  # [written] int64, the rows that go to the cache; None: all of them
    slots: Tensor  # [written] int32
    block_table: Tensor  # [seqs, max_blocks] int32
    lengths: list[int]  # [seqs], context lengths: the kernels want these on the host
    ends: list[int]  # [seqs], cumulative query lengths
    prefills: list[int]  # sequences with more than one query
    decodes: list[int] = field(default_factory=list)  # sequences with one
    decode_rows: Tensor | None = None  # [decodes] int64; None: every sequence is one
    decode_blocks: Tensor | None = None  # [decodes, max_blocks] int32
    tasks: Callable[[Issue, list[int]], None] | None = None
    """Takes a decode kernel in place of submitting it: a graph that is being captured."""


class AscendAttention(AttentionBackend):
    """``npu_fused_infer_attention_score`` for prefills and chunks of them, Transformer Boost's
    paged attention for decodes.

    Head sizes that the fused kernel refuses in a packed batch take one call for each sequence.
    """

    layouts = ("nhd",)
    block_sizes = range(BLOCK_MULTIPLE, LARGEST_BLOCK + 1, BLOCK_MULTIPLE)

    def __init__(self, device: Device, kv_layout: KvLayout) -> None:
        check_layout(self, kv_layout)
        require(
            device,
            "npu::npu_scatter_pa_kv_cache",
            "npu::npu_fused_infer_attention_score",
            "atb::_npu_paged_attention_v2.out",
        )
        self._block_size, self._device = kv_layout.block_size, device.torch_device
        self._write = torch.ops.npu.npu_scatter_pa_kv_cache
        self._fused = torch.ops.npu.npu_fused_infer_attention_score
        self._paged = torch.ops.atb._npu_paged_attention_v2.out
        self._mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8, device=self._device).triu(1)

    def check(self, spec: AttentionSpec) -> None:
        check_spec(spec)
        size, group = spec.head_size, spec.num_heads // spec.num_kv_heads
        if size % HEAD_MULTIPLE or size > LARGEST_HEAD:
            why = f"heads of {size}: they take multiples of {HEAD_MULTIPLE} up to {LARGEST_HEAD}"
        elif group > LARGEST_GROUP:
            why = f"{group} heads that share a kv head: they take up to {LARGEST_GROUP}"
        elif spec.window is not None:
            why = f"a sliding window (of {spec.window} tokens) in decodes"
        elif spec.soft_cap is not None:
            why = f"a soft cap (of {spec.soft_cap:g}) on scores"
        else:
            return
        raise ConfigError(f"the kernels of attention=ascend lack {why}; take attention=sdpa")

    def build(self, batch: BatchPlan, out: Any | None = None) -> Metadata:
        # one look at the slots a step, while the device is idle anyhow; the kernel has no "nowhere"
        kept = batch.slot_mapping >= 0
        written = None if bool(kept.all()) else kept.nonzero()[:, 0]
        slots = batch.slot_mapping if written is None else batch.slot_mapping[written]
        queries, ends, end = batch.query_lens_host, [], 0
        for count in queries:
            end += count
            ends.append(end)
        metadata = Metadata(
            written=written,
            slots=slots.int(),
            block_table=batch.block_table.contiguous(),
            lengths=list(batch.seq_lens_host),
            ends=ends,
            prefills=[i for i, count in enumerate(queries) if count > 1],
            decodes=[i for i, count in enumerate(queries) if count == 1],
        )
        if metadata.prefills and metadata.decodes:
            last = [ends[i] - 1 for i in metadata.decodes]
            rows = torch.tensor(last, dtype=torch.int64, device=self._device)
            sequences = torch.tensor(metadata.decodes, dtype=torch.int64, device=self._device)
            metadata.decode_rows, metadata.decode_blocks = rows, batch.block_table[sequences]
        return metadata

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        m: Metadata = metadata
        if cache.key.dtype is not q.dtype:
            raise ConfigError(
                f"the kernels of attention=ascend take a cache of the model's dtype, {q.dtype}, "
                f"and it is {cache.key.dtype}; leave it auto",
                key="kv_layout.dtype",
            )
        if m.written is not None:
            k, v = k[m.written], v[m.written]
        if len(m.slots):
            self._write(
                k.contiguous(), v.contiguous(), cache.key, cache.value, m.slots, cache_mode="Norm"
            )
        q, used = q.contiguous(), m.ends[-1]
        if not m.prefills:
            out = torch.empty_like(q) if used == len(q) else torch.zeros_like(q)
            self._decode(q[:used], cache, m.block_table, m.lengths, spec, out[:used], m.tasks)
            return out
        if spec.head_size in PACKED_HEAD_SIZES:
            packed = self._prefill(q[:used], cache, "TND", m.ends, m.lengths, m.block_table, spec)
            return packed if used == len(q) else torch.cat([packed, torch.zeros_like(q[used:])])
        out = torch.zeros_like(q)
        for i in m.prefills:
            rows = slice(m.ends[i - 1] if i else 0, m.ends[i])
            out[rows] = self._prefill(
                q[rows][None],  # [1, queries, heads, head_size]
                cache,
                "BSND",
                [rows.stop - rows.start],
                [m.lengths[i]],
                m.block_table[i : i + 1],
                spec,
            )[0]
        if m.decode_rows is not None and m.decode_blocks is not None:
            single = q[m.decode_rows]
            mixed = torch.empty_like(single)
            lengths = [m.lengths[i] for i in m.decodes]
            self._decode(single, cache, m.decode_blocks, lengths, spec, mixed, None)
            out[m.decode_rows] = mixed
        return out

    def _prefill(
        self,
        q: Tensor,
        cache: LayerCache,
        layout: str,
        queries: list[int],
        lengths: list[int],
        block_table: Tensor,
        spec: AttentionSpec,
    ) -> Tensor:
        """``queries``: cumulative in the packed layout TND, else each sequence's own."""
        out: Tensor = self._fused(
            q,
            cache.key.flatten(2),  # [blocks, block_size, kv_heads * head_size]
            cache.value.flatten(2),
            atten_mask=self._mask,
            actual_seq_lengths=queries,
            actual_seq_lengths_kv=lengths,
            block_table=block_table,
            num_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            scale=spec.scale,
            input_layout=layout,
            sparse_mode=CAUSAL,
            block_size=self._block_size,
        )[0]
        return out

    def _decode(
        self,
        q: Tensor,
        cache: LayerCache,
        block_table: Tensor,
        lengths: list[int],
        spec: AttentionSpec,
        out: Tensor,
        tasks: Callable[[Issue, list[int]], None] | None,
    ) -> None:
        """q and out [seqs, heads, head_size], block_table [seqs, max_blocks]."""
        arguments: dict[str, Any] = {
            "value_cache": cache.value,
            "num_kv_heads": spec.num_kv_heads,
            "num_heads": spec.num_heads,
            "scale_value": spec.scale,
            "out": out,
        }
        if tasks is None:
            self._paged(q, cache.key, block_table, lengths, **arguments)
            return
        # what the kernel needs beside its operands must outlive the capture
        size = torch.ops.atb._npu_paged_attention_v2_get_workspace
        workspace = size(q, cache.key, block_table, lengths, **arguments)

        def issue(lengths: list[int]) -> None:
            self._paged(q, cache.key, block_table, lengths, workspace=workspace, **arguments)

        tasks(issue, lengths)
