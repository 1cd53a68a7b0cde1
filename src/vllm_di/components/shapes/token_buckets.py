"""Static shapes by the number of tokens alone, for attention that takes any lengths of queries."""

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
from vllm_di.components.shapes.sizes import Count, Sizes, padding_slot


class TokenBuckets(ShapePolicy):
    """Pads the tokens of a step to the next of ``sizes``; its sequences and their blocks always to
    the most that there can be. Rows of logits are one for each sequence, or for each token where
    more are wanted."""

    def __init__(
        self,
        model: Model,
        kv_layout: KvLayout,
        limits: SchedulerLimits,
        *,
        sizes: list[Count],
        max_num_seqs: Count,
        max_num_batched_tokens: Count,
    ) -> None:
        self._sizes = Sizes(
            "sizes", sizes, max_num_batched_tokens, "lower scheduler.max_num_batched_tokens"
        )
        self._slot, self._seqs = padding_slot(limits), max_num_seqs
        self._columns = -(-model.max_model_len // kv_layout.block_size)

    def pad(self, plan: BatchPlan) -> BatchPlan:
        found = plan.shape
        shape = self._shape(self._sizes.over(found.tokens), found.rows > self._seqs)
        return pad_to(plan, shape, self._slot)

    def warm_up_plans(
        self, largest: PlanShape, blank: Callable[[PlanShape], BatchPlan]
    ) -> Iterator[BatchPlan]:
        for tokens in self._sizes.sizes:
            for all_rows in (False, True) if tokens > self._seqs else (False,):
                yield blank_of(self._shape(tokens, all_rows), blank, self._slot)
            if tokens >= largest.tokens:
                return

    def _shape(self, tokens: int, all_rows: bool) -> PlanShape:
        return PlanShape(
            tokens=tokens,
            rows=tokens if all_rows else self._seqs,
            seqs=self._seqs,
            columns=self._columns,
            queries=tokens,
        )
