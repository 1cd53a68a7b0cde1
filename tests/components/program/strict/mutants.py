"""Programs, policies and communicators that break one rule each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from tests.components.program.strict.program import StrictProgram
from torch import Tensor

from vllm_di.components.communicator.marked import MarkedCommunicator
from vllm_di.components.interfaces import BatchPlan, PlanShape, WeightPart
from vllm_di.components.messages import CacheSize, KvGroup
from vllm_di.components.shapes.grid import GridShapes
from vllm_di.components.worker.standard import StandardWorker


class PadsIntoABlock(GridShapes):
    """Padding lies in block 1, which a sequence owns."""

    def pad(self, plan: BatchPlan) -> BatchPlan:
        self._slot = self._block_size
        return super().pad(plan)


class OneShapeTooFew(GridShapes):
    """The longest prompts have no program."""

    def warm_up_plans(
        self, largest: PlanShape, blank: Callable[[PlanShape], BatchPlan]
    ) -> Iterator[BatchPlan]:
        for plan in super().warm_up_plans(largest, blank):
            if plan.max_query_len < 32:
                yield plan


class ReadsTheOldCache(StrictProgram):
    """Takes the first cache for the cache."""

    def replace(self, cache: Tensor) -> None: ...


class SwapsShardDims(StrictProgram):
    """Cuts rows where columns are to be cut."""

    def parts(self) -> Mapping[str, tuple[WeightPart, ...]]:
        swapped = {0: 1, 1: 0}
        return {
            name: tuple(
                replace(part, shard_dim=swapped[part.shard_dim])
                if part.shard_dim is not None and part.name.endswith("o_proj.weight")
                else part
                for part in parts
            )
            for name, parts in super().parts().items()
        }


class DropsAMark(MarkedCommunicator):
    """While a step is traced the sum over ranks is this rank's part."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x if self._marks else super().all_reduce(x)


class SizesTheCacheFirst(StandardWorker):
    """Asks how much memory is free before the programs are compiled."""

    def prepare(self, groups: list[KvGroup]) -> CacheSize:
        free = self._device.memory()
        size = super().prepare(groups)
        assert free is not None
        return CacheSize(free.free // size.bytes_per_block, size.bytes_per_block)


class Mutant(NamedTuple):
    override: str
    reason: str
    """Regular expression: what kills it must say."""
    ranks: int = 1

    @property
    def overrides(self) -> Sequence[str]:
        return (self.override.replace("=", f"._target_={__name__}."),)


MUTANTS = (
    Mutant("shapes=PadsIntoABlock", "tokens"),
    Mutant("shapes=OneShapeTooFew", r"no program was compiled for .*queries=32"),
    Mutant("program=ReadsTheOldCache", "not finite"),
    Mutant("program=SwapsShardDims", r"tokens|shape", ranks=2),
    Mutant("communicator=DropsAMark", "tokens", ranks=2),
    Mutant("worker=SizesTheCacheFirst", r"a cache of \d+ blocks: \d+ bytes do not fit"),
)
