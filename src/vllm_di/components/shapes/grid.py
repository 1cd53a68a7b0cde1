"""Static shapes by phase: decode steps by sequences and blocks, prefill steps by sequences, tokens
of each and blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


class GridShapes(ShapePolicy):
    """Every step has one of a fixed number of shapes, all of which are warmed up.

    A decode step has as many tokens and rows of logits as sequences. A prefill step has
    ``sequences x queries`` tokens, and a row of logits for each sequence, or for each token where
    prompts are scored. The scheduler keeps both apart and prefills no more sequences at once than
    there is a shape for: the constructor refuses limits that do not make it.
    """

    def __init__(
        self,
        model: Model,
        kv_layout: KvLayout,
        limits: SchedulerLimits,
        *,
        decode_seqs: list[Count],
        prefill_seqs: list[Count],
        prefill_queries: list[Count],
        columns: list[Count],
        max_num_seqs: Count,
        max_num_batched_tokens: Count,
    ) -> None:
        report = limits.report()
        self._slot, self._max_tokens = padding_slot(limits), max_num_batched_tokens
        self._block_size = kv_layout.block_size
        refuse_mixed(limits, "shapes=grid")
        rows = min(report.max_prefill_rows or max_num_seqs, max_num_seqs)
        self._decode_seqs = Sizes(
            "decode_seqs", decode_seqs, max_num_seqs, "lower scheduler.max_num_seqs"
        )
        self._prefill_seqs = Sizes(
            "prefill_seqs", prefill_seqs, rows, f"set limits.max_prefill_rows={max(prefill_seqs)}"
        )
        self._queries = Sizes(
            "prefill_queries",
            prefill_queries,
            min(max_num_batched_tokens, model.max_model_len),
            "lower scheduler.max_num_batched_tokens",
        )
        self._columns = Sizes(
            "columns",
            columns,
            -(-model.max_model_len // kv_layout.block_size),
            f"lower model.max_model_len ({model.max_model_len})",
        )

    def pad(self, plan: BatchPlan) -> BatchPlan:
        found = plan.shape
        columns = self._columns.over(found.columns)
        if found.queries <= 1:
            return pad_to(plan, _decode(self._decode_seqs.over(found.seqs), columns), self._slot)
        seqs = self._prefill_seqs.over(found.seqs)
        shape = _prefill(seqs, self._queries.over(found.queries), columns, found.rows > seqs)
        return pad_to(plan, shape, self._slot)

    def warm_up_plans(
        self, largest: PlanShape, blank: Callable[[PlanShape], BatchPlan]
    ) -> Iterator[BatchPlan]:
        for shape in self._shapes():
            yield blank_of(shape, blank, self._slot)

    def _shapes(self) -> Iterator[PlanShape]:
        """Those that a step within the scheduler's limits can have."""
        for columns in self._columns.sizes:
            for seqs in self._decode_seqs.sizes:
                yield _decode(seqs, columns)
            for seqs in self._prefill_seqs.sizes:
                for queries in self._queries.sizes:
                    least = self._queries.below(queries) + 1 + self._prefill_seqs.below(seqs)
                    if least > self._max_tokens or columns * self._block_size <= (
                        self._queries.below(queries)
                    ):
                        continue
                    yield _prefill(seqs, queries, columns, False)
                    if seqs * queries > seqs:
                        yield _prefill(seqs, queries, columns, True)


def _decode(seqs: int, columns: int) -> PlanShape:
    return PlanShape(tokens=seqs, rows=seqs, seqs=seqs, columns=columns, queries=1)


def _prefill(seqs: int, queries: int, columns: int, scored: bool) -> PlanShape:
    tokens = seqs * queries
    return PlanShape(tokens, tokens if scored else seqs, seqs, columns, queries)
