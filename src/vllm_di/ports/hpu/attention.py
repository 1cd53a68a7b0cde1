"""Attention in the forms that Gaudi's compiler takes: flat blocks for decodes, FusedSDPA for
prompts, over a cache of [blocks, block_size, kv_heads, head_size] that is also read as flat slots.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
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
    SchedulerLimits,
)
from vllm_di.components.products import matmul
from vllm_di.components.shapes.sizes import refuse_mixed
from vllm_di.errors import ConfigError
from vllm_di.ports.hpu.shapes import FlatShape
from vllm_di.ports.hpu.vendor import fused_sdpa


@dataclass(slots=True)
class Decode:
    """A step of one token for each sequence."""

    slots: Tensor  # [tokens] int64, padding in the null block
    block_list: Tensor  # [blocks] int64, the blocks of all sequences one behind the other
    block_groups: Tensor  # [blocks] int64, whose each is; of padding the number of sequences
    block_usage: Tensor  # [blocks] int64, its tokens in use; 1 of padding


@dataclass(slots=True)
class Prompts:
    """A step of prompts or chunks of them, padded on the right to S tokens."""

    slots: Tensor  # [tokens] int64, padding in the null block
    rows: Tensor  # [seqs * S] int64, the token at each place; a sequence's last beyond its end
    places: Tensor  # [tokens] int64, where each token stands in ``rows``; any of padding
    lengths: Tensor  # [seqs] int32, tokens of each in the step; 1 of padding
    past_blocks: Tensor | None = None  # [seqs * columns] int64; None: no sequence has a context
    past_lengths: Tensor | None = None  # [seqs] int64


class HpuAttention(AttentionBackend):
    """Prefill and decode steps apart. Padding is written to block 0, which nobody reads."""

    layouts = ("nhd",)

    def __init__(self, device: Device, kv_layout: KvLayout, limits: SchedulerLimits) -> None:
        check_layout(self, kv_layout)
        refuse_mixed(limits, "attention=hpu")
        if not limits.report().null_block:
            raise ConfigError("attention=hpu writes padding to block 0; set limits.null_block=true")
        self._block_size, self._device = kv_layout.block_size, device.torch_device
        self._sdpa = fused_sdpa(device)

    def check(self, spec: AttentionSpec) -> None:
        check_spec(spec)
        if spec.window is not None:
            why = f"a sliding window (of {spec.window} tokens)"
        elif spec.soft_cap is not None:
            why = f"a soft cap (of {spec.soft_cap:g}) on scores"
        else:
            return
        raise ConfigError(f"attention=hpu lacks {why}; take attention=sdpa")

    def build(self, batch: BatchPlan, out: Any | None = None) -> Decode | Prompts:
        slots = batch.slot_mapping.clamp(min=0)
        blocks = batch.padded_to.blocks if isinstance(batch.padded_to, FlatShape) else None
        if batch.max_query_len <= 1:
            return self._decode(batch, slots, blocks)
        return self._prompts(batch, slots, blocks)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        for cached, new in ((cache.key, k), (cache.value, v)):
            cached.flatten(0, 1).index_copy_(0, metadata.slots, new.to(cached.dtype))
        if isinstance(metadata, Decode):
            return flat_attention(q, cache, metadata, spec.scale)
        return self._attend_prompts(q, k, v, cache, metadata, spec)

    def _decode(self, batch: BatchPlan, slots: Tensor, blocks: int | None) -> Decode:
        rows: list[int] = []
        columns: list[int] = []
        usage: list[int] = []
        size = self._block_size
        for row, length in enumerate(batch.seq_lens_host):
            held = -(-length // size)
            rows += [row] * held
            columns += range(held)
            usage += [min(size, length - column * size) for column in range(held)]
        padding = max(1, blocks or 0, len(rows)) - len(rows)
        seqs = len(batch.seq_lens_host)
        groups = self._put(rows + [seqs] * padding)
        picked = batch.block_table[self._put(rows), self._put(columns)].long()
        return Decode(
            slots=slots,
            block_list=torch.cat([picked, picked.new_zeros(padding)]),
            block_groups=groups,
            block_usage=self._put(usage + [1] * padding),
        )

    def _prompts(self, batch: BatchPlan, slots: Tensor, blocks: int | None) -> Prompts:
        queries, longest = batch.query_lens_host, batch.max_query_len
        past = [n - count for n, count in zip(batch.seq_lens_host, queries, strict=True)]
        rows: list[int] = []
        places: list[int] = []
        starts = itertools.accumulate(queries, initial=0)
        for seq, (start, count) in enumerate(zip(starts, queries, strict=False)):
            last = max(0, start + count - 1)
            rows += [min(start + step, last) for step in range(longest)]
            places += range(seq * longest, seq * longest + count)
        places += [0] * (len(slots) - len(places))
        metadata = Prompts(
            slots=slots,
            rows=self._put(rows),
            places=self._put(places),
            lengths=self._put([max(1, count) for count in queries]).int(),
        )
        columns = -(-max(past) // self._block_size) if blocks is None else blocks
        if columns:
            metadata.past_blocks = batch.block_table[:, :columns].flatten().long()
            metadata.past_lengths = self._put(past)
        return metadata

    def _attend_prompts(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, m: Prompts, spec: AttentionSpec
    ) -> Tensor:
        seqs = len(m.lengths)
        # [seqs, S, heads, head_size] each
        q, k, v = (x.index_select(0, m.rows).unflatten(0, (seqs, -1)) for x in (q, k, v))
        mask: Tensor | None = None
        if m.past_blocks is not None and m.past_lengths is not None:
            mask, in_past = _context_mask(m, self._block_size, q.shape[1])
            k, v = (
                torch.cat([_past(cached, m.past_blocks, in_past).to(new.dtype), new], 1)
                for cached, new in ((cache.key, k), (cache.value, v))
            )
        mode = "fp32" if q.dtype is torch.float32 else "fast"
        out: Tensor = self._sdpa(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            None if mask is None else mask.to(q.dtype),
            0.0,
            mask is None,  # causal: the kernel takes no mask beside it
            spec.scale,
            mode,
            True,
            m.lengths if mask is None else None,
            "right",
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, m.places)

    def _put(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device)


def flat_attention(q: Tensor, cache: LayerCache, m: Decode, scale: float) -> Tensor:
    """q [seqs, heads, head_size], one query each -> the same shape.

    Each block is attended on its own, and its result scaled by the maximum of its group. Rows are
    picked and added by index, where a product with a one-hot matrix would carry one sequence's NaN
    into all others; what lies beyond a block's usage is dropped for the same reason.
    """
    seqs, kv_heads = len(q), cache.key.shape[2]
    slots = torch.arange(cache.key.shape[1], dtype=torch.int64, device=q.device)
    used = slots < m.block_usage[:, None]
    owners = m.block_groups.clamp(max=seqs - 1)  # padding asks for any row
    # [blocks, kv_heads, heads of each, head_size]
    query = (scale * q).index_select(0, owners).unflatten(1, (kv_heads, -1))
    key = cache.key.index_select(0, m.block_list).to(q.dtype).permute(0, 2, 3, 1)
    value = cache.value.index_select(0, m.block_list).to(q.dtype)
    value = torch.where(used[..., None, None], value, 0.0).transpose(1, 2)
    scores = matmul(query, key).float()
    scores = torch.where(used[:, None, None], scores, -math.inf)
    block_max = scores.amax(-1, keepdim=True)
    weights = (scores - block_max).exp()
    mixed = matmul(weights.to(value.dtype), value).float()
    # a group more than there are sequences: that of padding
    group_max = block_max.new_full((seqs + 1, *block_max.shape[1:]), -math.inf)
    places = m.block_groups[:, None, None, None].expand_as(block_max)
    group_max = group_max.scatter_reduce_(0, places, block_max, "amax")
    rescale = (block_max - group_max.index_select(0, m.block_groups)).exp()
    sums = torch.zeros_like(group_max)
    sums = sums.index_add_(0, m.block_groups, weights.sum(-1, keepdim=True) * rescale)
    out = mixed.new_zeros((seqs + 1, *mixed.shape[1:]))
    out = out.index_add_(0, m.block_groups, mixed * rescale)
    # a padding sequence has no block: 0 / 1
    sums = torch.where(sums == 0, 1.0, sums)
    return (out / sums)[:seqs].flatten(1, 2).to(q.dtype)


def _context_mask(m: Prompts, block_size: int, queries: int) -> tuple[Tensor, Tensor]:
    """-> what is added to scores [seqs, 1, queries, past + queries], which slots before the step
    are filled [seqs, past]."""
    assert m.past_blocks is not None and m.past_lengths is not None
    seqs, device = len(m.lengths), m.slots.device
    length = len(m.past_blocks) // seqs * block_size
    in_past = torch.arange(length, dtype=torch.int64, device=device) < m.past_lengths[:, None]
    step = torch.arange(queries, dtype=torch.int64, device=device)
    causal = (step <= step[:, None]).expand(seqs, -1, -1)
    seen = torch.cat([in_past[:, None].expand(-1, queries, -1), causal], -1)
    return torch.where(seen, 0.0, -math.inf)[:, None], in_past


def _past(cached: Tensor, blocks: Tensor, filled: Tensor) -> Tensor:
    """-> [seqs, past, kv_heads, head_size], zero where nothing is filled."""
    found = cached.index_select(0, blocks).flatten(0, 1).unflatten(0, filled.shape)
    return torch.where(filled[..., None, None], found, 0.0)
