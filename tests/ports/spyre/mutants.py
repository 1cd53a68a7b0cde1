"""Parts of platform=spyre that break one rule each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from tests.ports.openvino.running import Share, tokens
from tests.ports.spyre.running import BLOCK, STEPS

from vllm_di.components.interfaces import BatchPlan, PlanShape
from vllm_di.components.shapes.padding import pad_to
from vllm_di.ports.spyre.attention import SpyreAttention, TracedBatch
from vllm_di.ports.spyre.shapes import SpyreShapes


class MixesPhases(SpyreShapes):
    """Prompts beside decodes."""

    def pad(self, plan: BatchPlan) -> BatchPlan:
        found = plan.shape
        if found.seqs > 1 and found.queries > 1:
            rows = 2 * BLOCK
            return pad_to(plan, PlanShape(4 * rows, found.rows, 4, 4, rows), self._slot)
        return super().pad(plan)


class Exported(SpyreAttention):
    """Changes what attention tells a program of a step."""

    def export(self) -> Callable[[BatchPlan], TracedBatch]:
        inner = super().export()
        return lambda plan: self.spoil(inner(plan))

    def spoil(self, batch: TracedBatch) -> TracedBatch:
        return batch


class CountsTheLeftPad(Exported):
    """Blocks of padding are context."""

    def spoil(self, batch: TracedBatch) -> TracedBatch:
        return replace(batch, left=batch.left * 0)


class PadsIntoABlock(Exported):
    """What is padded is written to a block that a sequence owns."""

    def spoil(self, batch: TracedBatch) -> TracedBatch:
        owned = batch.table.max() * BLOCK
        return replace(batch, slots=batch.slots + (batch.slots < BLOCK) * owned)


class WritesToTheNullBlock(Exported):
    """Tokens are written where padding is."""

    def spoil(self, batch: TracedBatch) -> TracedBatch:
        return replace(batch, slots=batch.slots % BLOCK)


class PadsBehind(Exported):
    """The table's padding stands behind the blocks, and its length says before."""

    def spoil(self, batch: TracedBatch) -> TracedBatch:
        shift = int(batch.left[0]) // BLOCK
        return replace(batch, table=batch.table.roll(-shift, 1))


class Mutant(NamedTuple):
    override: str
    reason: str
    """Regular expression: what kills it must say."""
    steps: Sequence[list[Share]] = STEPS

    @property
    def overrides(self) -> Sequence[str]:
        return (self.override.replace("=", f"._target_={__name__}."),)


MUTANTS = (
    Mutant(
        "shapes=MixesPhases", "compiled one at a time", [[(0, tokens(0, 1)), (1, tokens(1, 9))]]
    ),
    Mutant("attention=CountsTheLeftPad", "logits differ"),
    Mutant("attention=PadsIntoABlock", "logits differ"),
    Mutant("attention=WritesToTheNullBlock", "logits differ"),
    Mutant("attention=PadsBehind", "logits differ"),
)
