"""Attention of the two phases as Neuron's kernels split it: the cache as it was before the step,
and the tokens of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_di.components import products
from vllm_di.components.attention.sdpa import PaddedBatch, SdpaAttention
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    KvLayout,
    LayerCache,
    TracedCache,
)

UNSEEN = -1e30
"""A score that no query sees: finite, since padding sees nothing at all."""


class NeuronAttention(AttentionBackend):
    """Context encoding (sequences x queries, over a prefix in the cache) and token generation (one
    query of each sequence) are one piece of torch ops, which a step's shape makes one or the other.
    New tokens are attended for from the step itself; the program writes them afterwards.

    Called eagerly (``program=eager``) it is ``attention=sdpa``.
    """

    layouts = ("nhd",)

    def __init__(self, kv_layout: KvLayout) -> None:
        self._layout, self._eager = kv_layout, SdpaAttention(kv_layout)

    def check(self, spec: AttentionSpec) -> None:
        self._eager.check(spec)

    def build(self, batch: BatchPlan, out: Any | None = None) -> BatchPlan:
        return self._eager.build(batch, out)

    def export(self) -> Callable[[BatchPlan], PaddedBatch]:
        return self._eager.export()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        if not isinstance(metadata, PaddedBatch):
            return self._eager.forward(q, k, v, cache, metadata, spec)
        assert isinstance(cache, TracedCache)
        cache.new = (k, v)
        prior = self._layout.gather_blocks(cache, metadata.blocks)
        return _attend(q, (k, v), prior, metadata, spec)


def _attend(
    q: Tensor,
    new: tuple[Tensor, Tensor],
    prior: tuple[Tensor, Tensor],
    batch: PaddedBatch,
    spec: AttentionSpec,
) -> Tensor:
    """q [tokens, heads, head_size], new keys and values [tokens, kv_heads, head_size], prior ones
    [seqs, length, kv_heads, head_size] -> as q."""
    column = torch.arange(prior[0].shape[1], dtype=torch.int64, device=q.device)
    cached = column < batch.past_lens[:, None]  # [seqs, length]: beyond, anything, NaN too
    fresh = batch.positions < batch.seq_lens[:, None]  # [seqs, queries]
    at = batch.positions[..., None]  # [seqs, queries, 1]
    # [seqs, queries, length + queries]
    seen = torch.cat((cached[:, None].expand(-1, at.shape[1], -1), _earlier(fresh, batch)), 2)
    if spec.window is not None:
        position = torch.cat((column[None].expand_as(cached), batch.positions), 1)
        seen = seen & (position[:, None] > at - spec.window)
    # [seqs, kv_heads, group, queries, head_size]
    grouped = q[batch.rows].unflatten(2, (spec.num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
    active = [rows.to(prior[0].dtype)[batch.rows] for rows in new]
    keys = [_by_heads(rows, q.dtype) for rows in (prior[0], active[0])]
    scores = torch.cat([products.matmul(grouped, rows.mT).float() for rows in keys], -1)
    scores = scores * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    weights = torch.where(seen[:, None, None], scores, UNSEEN).softmax(-1).to(q.dtype)
    length = column.shape[0]
    mixed = sum(
        products.matmul(share, _by_heads(torch.where(there[..., None, None], rows, 0.0), q.dtype))
        for share, there, rows in (
            (weights[..., :length], cached, prior[1]),
            (weights[..., length:], fresh, active[1]),
        )
    )
    assert isinstance(mixed, Tensor)
    return mixed.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)[batch.places]


def _earlier(fresh: Tensor, batch: PaddedBatch) -> Tensor:
    """-> [seqs, queries, queries]: which new tokens a new token sees."""
    return fresh[:, None] & (batch.positions[:, None] <= batch.positions[..., None])


def _by_heads(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[seqs, length, kv_heads, head_size] -> [seqs, kv_heads, 1, length, head_size]."""
    return rows.transpose(1, 2)[:, :, None].to(dtype)
