"""The sizes that graphs are captured for: small steps are padded to the next of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Annotated

import msgspec

from vllm_di.components.interfaces import BatchPlan, PlanShape, ShapePolicy
from vllm_di.components.shapes.padding import pad_tokens
from vllm_di.errors import ConfigError

Count = Annotated[int, msgspec.Meta(ge=1)]


class CaptureSizes(ShapePolicy):
    """Pads a step of up to ``max_num_seqs`` tokens to the next of ``sizes``; that number itself is
    one of them. Longer steps are taken as they come."""

    def __init__(self, *, sizes: list[Count], max_num_seqs: Count) -> None:
        if not sizes:
            raise ConfigError("sizes: none given; shapes=dynamic pads nothing")
        self._sizes = sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})

    def pad(self, plan: BatchPlan) -> BatchPlan:
        place = bisect_left(self._sizes, len(plan.token_ids))
        return pad_tokens(plan, self._sizes[place]) if place < len(self._sizes) else plan

    def warm_up_plans(
        self, largest: PlanShape, blank: Callable[[PlanShape], BatchPlan]
    ) -> Iterator[BatchPlan]:
        """A decode step of each size, and the longest prompt: it needs the most memory."""
        for size in self._sizes:
            if size <= largest.seqs:
                yield self.pad(blank(PlanShape(size, rows=size, seqs=size, columns=1, queries=1)))
        if largest.queries > 1:
            longest = PlanShape(largest.queries, rows=1, seqs=1, columns=1, queries=largest.queries)
            yield self.pad(blank(longest))
