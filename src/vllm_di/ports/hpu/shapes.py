"""Buckets: decode steps by sequences and blocks, prefill steps by sequences, queries and blocks of
earlier context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vllm_di.components.interfaces import (
    BatchPlan,
    KvLayout,
    Model,
    PlanShape,
    SchedulerLimits,
    ShapePolicy,
)
from vllm_di.components.shapes.padding import blank_of, pad_to
from vllm_di.components.shapes.sizes import Count, Sizes, padding_slot, refuse_mixed


@dataclass(frozen=True, slots=True)
class FlatShape(PlanShape):
    """A bucket."""

    blocks: int = 0
    """Decode: blocks of all sequences together. Prefill: blocks of a sequence's context before the
    step, 0 for whole prompts."""


class HpuShapes(ShapePolicy):
    """Every step has one of these shapes, all of which are warmed up. The largest number of blocks
    follows from the model and the scheduler and is added to the lists."""

    def __init__(
        self,
        model: Model,
        kv_layout: KvLayout,
        limits: SchedulerLimits,
        *,
        decode_seqs: list[Count],
        decode_blocks: list[Count],
        prefill_seqs: list[Count],
        prefill_queries: list[Count],
        context_blocks: list[Count],
        max_num_seqs: Count,
        max_num_batched_tokens: Count,
    ) -> None:
        report = limits.report()
        refuse_mixed(limits, "shapes=hpu")
        self._slot, self._max_tokens = padding_slot(limits), max_num_batched_tokens
        self._block_size = kv_layout.block_size
        self._columns = -(-model.max_model_len // self._block_size)
        prefills = min(report.max_prefill_rows or max_num_seqs, max_num_seqs)
        queries = min(max_num_batched_tokens, model.max_model_len)
        self._decode_seqs = Sizes(
            "decode_seqs", decode_seqs, max_num_seqs, "lower scheduler.max_num_seqs"
        )
        self._prefill_seqs = Sizes(
            "prefill_seqs",
            prefill_seqs,
            prefills,
            f"set limits.max_prefill_rows={max(prefill_seqs, default=1)}",
        )
        self._queries = Sizes(
            "prefill_queries",
            prefill_queries,
            queries,
            "lower scheduler.max_num_batched_tokens (longer prompts run in chunks)",
        )
        most = max_num_seqs * self._columns
        self._blocks = _up_to("decode_blocks", decode_blocks, most)
        # a step that continues a prompt adds a token at least
        earlier = -(-(model.max_model_len - 1) // self._block_size)
        self._context = _up_to("context_blocks", context_blocks, earlier)

    def pad(self, plan: BatchPlan) -> BatchPlan:
        return pad_to(plan, self._bucket(plan), self._slot)

    def warm_up_plans(
        self, largest: PlanShape, blank: Callable[[PlanShape], BatchPlan]
    ) -> Iterator[BatchPlan]:
        for shape in self._buckets():
            yield blank_of(shape, blank, self._slot)

    def _bucket(self, plan: BatchPlan) -> FlatShape:
        found, size = plan.shape, self._block_size
        if found.queries <= 1:
            blocks = sum(-(-length // size) for length in plan.seq_lens_host)
            return self._decode(self._decode_seqs.over(found.seqs), self._blocks.over(blocks))
        seqs = self._prefill_seqs.over(found.seqs)
        longest = max(
            length - count
            for length, count in zip(plan.seq_lens_host, plan.query_lens_host, strict=True)
        )
        context = self._context.over(-(-longest // size)) if longest else 0
        queries = self._queries.over(found.queries)
        return self._prefill(seqs, queries, context, found.rows > seqs)

    def _buckets(self) -> Iterator[FlatShape]:
        """Those that a step within the scheduler's limits can have."""
        for seqs in self._decode_seqs.sizes:
            fewest = self._decode_seqs.below(seqs) + 1
            for blocks in self._blocks.sizes:
                # so many sequences have a block each, and no more than the columns
                if blocks >= fewest and self._blocks.below(blocks) < seqs * self._columns:
                    yield self._decode(seqs, blocks)
        for seqs in self._prefill_seqs.sizes:
            for queries in self._queries.sizes:
                least = self._queries.below(queries) + 1 + self._prefill_seqs.below(seqs)
                if least > self._max_tokens:
                    continue
                for context in (0, *self._context.sizes):
                    yield self._prefill(seqs, queries, context, False)
                    if seqs * queries > seqs:
                        yield self._prefill(seqs, queries, context, True)

    def _decode(self, seqs: int, blocks: int) -> FlatShape:
        return FlatShape(seqs, seqs, seqs, self._columns, 1, blocks)

    def _prefill(self, seqs: int, queries: int, context: int, scored: bool) -> FlatShape:
        tokens = seqs * queries
        rows = tokens if scored else seqs
        return FlatShape(tokens, rows, seqs, self._columns, queries, context)


def _up_to(key: str, sizes: list[int], most: int) -> Sizes:
    return Sizes(key, [*(size for size in sizes if size < most), max(most, 1)], most, "")
