"""Any shape: nothing is padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vllm_di.components.interfaces import BatchPlan, PlanShape, ShapePolicy


class DynamicShapes(ShapePolicy):
    """For devices that take batches as they come."""

    def __init__(self) -> None: ...

    def pad(self, plan: BatchPlan) -> BatchPlan:
        return plan

    def warm_up_plans(
        self, largest: PlanShape, blank: Callable[[PlanShape], BatchPlan]
    ) -> Iterator[BatchPlan]:
        """One decode row and a small prefill: enough to have every kernel loaded."""
        yield blank(PlanShape(tokens=1, rows=1, seqs=1, columns=1, queries=1))
        if (chunk := min(16, largest.queries)) > 1:
            yield blank(PlanShape(tokens=chunk, rows=1, seqs=1, columns=1, queries=chunk))
