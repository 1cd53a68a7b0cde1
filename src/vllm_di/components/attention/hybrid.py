"""Two attention backends on one cache: one for chunks of prompts, one for single tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    KvLayout,
    LayerCache,
    Reuse,
)
from vllm_di.errors import ConfigError


@dataclass(slots=True)
class Halves:
    """Metadata of one step. A half without rows has None."""

    decode: Any
    prefill: Any
    num_decodes: int
    """Leading rows of the batch that are sequences with one token."""


class HybridAttention(AttentionBackend):
    """Splits each batch between ``decode`` (its leading sequences of one token) and ``prefill``
    (the rest, padding included). Both read and write the same blocks."""

    layouts = ("*",)
    """Layouts that both halves read: the constructor refuses others."""

    def __init__(
        self, kv_layout: KvLayout, *, prefill: AttentionBackend, decode: AttentionBackend
    ) -> None:
        for half, backend in (("prefill", prefill), ("decode", decode)):
            if not {"*", kv_layout.name} & {*backend.layouts}:
                raise ConfigError(
                    f"{half}: {type(backend).__name__} reads the KV layouts "
                    f"{', '.join(backend.layouts)}, but the cache that both halves share is "
                    f"{kv_layout.name!r}; take kv_layout={backend.layouts[0]}, or sdpa for this "
                    "half, which reads any"
                )
        self._prefill, self._decode = prefill, decode
        self.reuses = decode.reuses

    def check(self, spec: AttentionSpec) -> None:
        self._prefill.check(spec)
        self._decode.check(spec)

    def reuses_step(self, metadata: Any) -> frozenset[Reuse]:
        halves: Halves = metadata
        if halves.prefill is None:
            return self.reuses & self._decode.reuses_step(halves.decode)
        return self.reuses & self._prefill.reuses_step(halves.prefill)

    def build(self, batch: BatchPlan, out: Any | None = None) -> Halves:
        inner = out or Halves(None, None, 0)
        lens = batch.query_lens_host
        count = sum(1 for _ in itertools.takewhile(lambda length: length == 1, lens))
        if count == len(lens):
            return Halves(self._decode.build(batch, inner.decode), None, len(batch.token_ids))
        if count == 0:
            return Halves(None, self._prefill.build(batch, inner.prefill), 0)
        first, rest = _halves(batch, count)
        return Halves(
            self._decode.build(first, inner.decode), self._prefill.build(rest, inner.prefill), count
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        halves: Halves = metadata
        if halves.prefill is None:
            return self._decode.forward(q, k, v, cache, halves.decode, spec)
        if halves.decode is None:
            return self._prefill.forward(q, k, v, cache, halves.prefill, spec)
        n = halves.num_decodes
        one = self._decode.forward(q[:n], k[:n], v[:n], cache, halves.decode, spec)
        rest = self._prefill.forward(q[n:], k[n:], v[n:], cache, halves.prefill, spec)
        return torch.cat([one, rest])  # [tokens, heads, head_size]


def _halves(batch: BatchPlan, count: int) -> tuple[BatchPlan, BatchPlan]:
    """The first ``count`` sequences, of one token each, and the others."""

    def part(rows: slice, query_start: Tensor) -> BatchPlan:
        return replace(
            batch,
            token_ids=batch.token_ids[rows],
            positions=batch.positions[rows],
            query_start=query_start,
            seq_lens=batch.seq_lens[rows],
            block_table=batch.block_table[rows],
            slot_mapping=batch.slot_mapping[rows],
            logits_rows=batch.logits_rows[:0],  # those of the whole batch, not of a half
            query_lens_host=batch.query_lens_host[rows],
            seq_lens_host=batch.seq_lens_host[rows],
            hidden=None,
        )

    # one token a sequence: tokens and sequences are cut at the same place
    starts = batch.query_start
    return (
        part(slice(count), starts[: count + 1]),
        part(slice(count, None), starts[count:] - count),
    )
