"""Parts of platform=tpu with a flaw of their own kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from vllm_di.components.interfaces import BatchPlan, PlanShape
from vllm_di.components.shapes.token_buckets import TokenBuckets
from vllm_di.ports.tpu.program import TpuProgram


class DeadBuffer(TpuProgram):
    """Reads the cache that it gave away in the step before."""

    def run(self, plan: BatchPlan) -> Tensor:
        given = self.arrays
        out = super().run(plan)
        self.arrays = given
        return out


class LastBucketForgotten(TokenBuckets):
    """Off by one: the largest size is not warmed up."""

    def warm_up_plans(
        self, largest: PlanShape, blank: Callable[[PlanShape], BatchPlan]
    ) -> Iterator[BatchPlan]:
        plans = list(super().warm_up_plans(largest, blank))
        most = max(len(plan.token_ids) for plan in plans)
        yield from (plan for plan in plans if len(plan.token_ids) < most)


class PaddingInABlockInUse(TokenBuckets):
    """Padding is written where the first sequence's first token stands."""

    def pad(self, plan: BatchPlan) -> BatchPlan:
        padded = super().pad(plan)
        padded.slot_mapping[len(plan.token_ids) :] = plan.slot_mapping[0]
        return padded


class Mutant(NamedTuple):
    slot: str
    cls: type
    killer: str
    """The case that must fail."""
    reason: str
    """Regular expression: what it must say."""

    @property
    def override(self) -> str:
        return f"{self.slot}._target_={self.cls.__module__}.{self.cls.__name__}"


MUTANTS = (
    Mutant("program", DeadBuffer, "golden/test_tokens[gqa-float32]", "has been deleted"),
    Mutant(
        "shapes",
        LastBucketForgotten,
        "graphs/test_nothing_is_compiled_after_the_start",
        "num_compiles=[1-9]|== 0|compiled",
    ),
    Mutant(
        "shapes",
        PaddingInABlockInUse,
        "graphs/test_padding_is_written_to_no_block_in_use",
        "padding of 1 tokens is written to slots",
    ),
)
