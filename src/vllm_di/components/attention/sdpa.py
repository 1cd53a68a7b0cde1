"""The reference attention: gather a sequence's keys and values, then torch's scaled dot product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_di.components import products
from vllm_di.components.attention.spec import check_spec
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    KvLayout,
    LayerCache,
    TracedCache,
)
from vllm_di.components.ops.torch import attend, softmax_with_sinks
from vllm_di.components.shapes.padding import grown
from vllm_di.errors import ConfigError


@dataclass(slots=True)
class PaddedBatch:
    """A step as tensors alone, for a traced program: sequences padded to the longest query."""

    starts: Tensor  # [seqs] int64: the first token of each
    past_lens: Tensor  # [seqs] int64: tokens in the cache before the step
    rows: Tensor  # [seqs, queries] int64: the token of each query; any beyond a sequence's last
    places: Tensor  # [tokens] int64: where a token stands in ``rows``, flattened; any of padding
    positions: Tensor  # [seqs, queries] int64, of each query in its sequence
    seq_lens: Tensor  # [seqs] int64
    blocks: Tensor  # [seqs, columns] int64


class SdpaAttention(AttentionBackend):
    """One sequence at a time, on any KV layout: it reads and writes through the layout alone."""

    layouts = ("*",)
    """Any layout."""
    takes_sinks = True
    takes_bidirectional = True

    def __init__(self, kv_layout: KvLayout) -> None:
        self._layout = kv_layout

    def check(self, spec: AttentionSpec) -> None:
        check_spec(spec)

    def build(self, batch: BatchPlan, out: Any | None = None) -> BatchPlan:
        return batch

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        if isinstance(metadata, PaddedBatch):
            assert isinstance(cache, TracedCache)
            cache.new = (k, v)
            return _attend_padded(q, k, v, cache, metadata, spec, self._layout)
        plan: BatchPlan = metadata
        if not spec.causal:
            return _attend_both_ways(q, k, v, plan.query_lens_host, spec)
        self._layout.write(cache, k, v, plan.slot_mapping)
        out = torch.zeros_like(q)
        start = 0
        for row, (queries, length) in enumerate(
            zip(plan.query_lens_host, plan.seq_lens_host, strict=True)
        ):
            if not queries:  # padding
                continue
            keys, values = self._layout.gather(cache, plan.block_table[row], length)
            out[start : start + queries] = attend(
                q[start : start + queries],
                keys.transpose(0, 1),
                values.transpose(0, 1),
                spec.scale,
                spec.window,
                spec.soft_cap,
                spec.sinks,
            )
            start += queries
        return out

    def export(self) -> Callable[[BatchPlan], PaddedBatch]:
        if not self._layout.gathers_blocks:
            raise ConfigError(
                "in a compiled program attention=sdpa needs a KV layout that declares "
                f"gathers_blocks, and {self._layout.name!r} does not; kv_layout=hnd does"
            )
        return self._padded

    def _padded(self, plan: BatchPlan) -> PaddedBatch:
        start = plan.query_start[:-1].long()
        lengths = plan.seq_lens.long()
        counts = plan.query_start[1:].long() - start
        tokens, longest = len(plan.token_ids), plan.max_query_len
        steps = torch.arange(longest, dtype=torch.int64, device=start.device)
        owner = torch.repeat_interleave(counts)  # [tokens that belong to a sequence]
        offset = torch.arange(len(owner), dtype=torch.int64, device=start.device) - start[owner]
        past = lengths - counts
        return PaddedBatch(
            starts=start,
            past_lens=past,
            rows=(start[:, None] + steps).clamp(max=tokens - 1),
            places=grown(owner * longest + offset, tokens),
            positions=past[:, None] + steps,
            seq_lens=lengths,
            blocks=plan.block_table.long(),
        )


def _attend_both_ways(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], spec: AttentionSpec
) -> Tensor:
    """Each sequence on itself, whole; ``queries``: tokens of each."""
    out, start = torch.zeros_like(q), 0
    for count in filter(None, queries):
        # [1, heads, count, head_size]
        one, keys, values = (x[start : start + count].transpose(0, 1)[None] for x in (q, k, v))
        seen = torch.ones(count, count, dtype=torch.bool, device=q.device)
        grouped = spec.num_heads > spec.num_kv_heads
        mixed = products.attention(one, keys, values, seen, spec.scale, grouped=grouped)
        out[start : start + count] = mixed[0].transpose(0, 1)
        start += count
    return out


def _attend_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache,
    batch: PaddedBatch,
    spec: AttentionSpec,
    layout: KvLayout,
) -> Tensor:
    """As ``forward``, in torch ops that can be traced. The cache is as it was before the step: the
    new tokens are put among those that are gathered from it."""
    length = batch.blocks.shape[1] * layout.block_size
    column = torch.arange(length, dtype=torch.int64, device=q.device)
    filled = (column < batch.seq_lens[:, None])[:, None, :, None]  # [seqs, 1, length, 1]
    ages = column - batch.past_lens[:, None]  # [seqs, length]; below 0: in the cache
    # the new token of each place of the context; any where there is none
    source = (batch.starts[:, None] + ages).clamp(0, q.shape[0] - 1)
    is_new = (ages >= 0)[..., None, None]

    def gathered(old: Tensor, new: Tensor) -> Tensor:
        # [seqs, length, kv_heads, head_size]
        found = torch.where(is_new, new.to(old.dtype)[source], old)
        # -> [seqs, kv_heads, 1, length, head_size]
        return torch.where(filled, found.transpose(1, 2), 0.0)[:, :, None].to(q.dtype)

    keys, values = map(gathered, layout.gather_blocks(cache, batch.blocks), (k, v))
    seen = column <= batch.positions[..., None]  # [seqs, queries, length]
    if spec.window is not None:
        seen = seen & (column > batch.positions[..., None] - spec.window)
    # [seqs, queries, kv_heads, group, head_size]
    grouped = q[batch.rows].unflatten(2, (spec.num_kv_heads, -1))
    grouped = grouped.permute(0, 2, 3, 1, 4)
    scores = products.matmul(grouped, keys.mT).float() * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    # finite: a query beyond a sequence's last may see nothing
    scores = torch.where(seen[:, None, None], scores, -1e30)
    weights = softmax_with_sinks(scores, spec.sinks).to(q.dtype)
    mixed = products.matmul(weights, values).permute(0, 3, 1, 2, 4)
    return mixed.flatten(0, 1).flatten(1, 2)[batch.places]
