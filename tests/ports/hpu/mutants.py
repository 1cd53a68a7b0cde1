"""Parts of platform=hpu that break one rule each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vllm_di.components.interfaces import BatchPlan, PlanShape
from vllm_di.ports.hpu.attention import Decode, HpuAttention, Prompts
from vllm_di.ports.hpu.shapes import HpuShapes


class PaddingInASequencesGroup(HpuAttention):
    """Blocks that pad the list belong to the last sequence."""

    def build(self, batch: BatchPlan, out: Any | None = None) -> Decode | Prompts:
        m = super().build(batch, out)
        if isinstance(m, Decode):
            m.block_groups.clamp_(max=len(batch.seq_lens_host) - 1)
        return m


class WholeBlocksInUse(HpuAttention):
    """A sequence's last block counts as full."""

    def build(self, batch: BatchPlan, out: Any | None = None) -> Decode | Prompts:
        m = super().build(batch, out)
        if isinstance(m, Decode):
            m.block_usage.fill_(self._block_size)
        return m


class PaddingInABlockInUse(HpuAttention):
    """What pads a step is written to a block that a sequence owns."""

    def build(self, batch: BatchPlan, out: Any | None = None) -> Decode | Prompts:
        m = super().build(batch, out)
        owned = batch.block_table.max() * self._block_size
        m.slots += (m.slots < self._block_size) * owned
        return m


class ContextForgotten(HpuAttention):
    """A later chunk of a prompt attends to itself alone."""

    def build(self, batch: BatchPlan, out: Any | None = None) -> Decode | Prompts:
        m = super().build(batch, out)
        if isinstance(m, Prompts):
            m.past_blocks = m.past_lengths = None
        return m


class PhasesMixed(HpuAttention):
    """Takes a step for one of decodes where its first sequence has one token."""

    def build(self, batch: BatchPlan, out: Any | None = None) -> Decode | Prompts:
        if batch.query_lens_host[0] <= 1:
            slots = batch.slot_mapping.clamp(min=0)
            return self._decode(batch, slots, getattr(batch.padded_to, "blocks", None))
        return super().build(batch, out)


class LargestBucketForgotten(HpuShapes):
    """Off by one: the last decode step is not warmed up."""

    def warm_up_plans(
        self, largest: PlanShape, blank: Callable[[PlanShape], BatchPlan]
    ) -> Iterator[BatchPlan]:
        plans = list(super().warm_up_plans(largest, blank))
        decodes = [plan for plan in plans if plan.max_query_len <= 1]
        yield from (plan for plan in plans if plan is not decodes[-1])
