"""What is known of the sequences whose cache lies on several sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from vllm_di.components.executor.lanes import Lane
from vllm_di.components.executor.side_blocks import BlockLedger, Held
from vllm_di.components.messages import KvGroup, NewSequence, ScheduledSequence, StepPlan
from vllm_di.errors import EngineDeadError

AnyLane = TypeVar("AnyLane", bound=Lane)


@dataclass(slots=True)
class Live:
    """A sequence that the scheduler has not ended."""

    new: NewSequence
    generated: list[int] = field(default_factory=list)
    """Tokens that were chosen since ``new``."""
    blocks: list[list[int]] = field(default_factory=list)
    """The scheduler's, of each KvGroup."""
    lane: Lane | None = None
    """Whose workers know it."""
    num_told: list[int] = field(default_factory=list)
    """Of each KvGroup, how many blocks of its own that lane was told."""
    num_in_flight: int = 0


class SequenceBook:
    """Translates the scheduler's shares of a step into those of a lane, and keeps the ledger."""

    def __init__(
        self, groups: Sequence[KvGroup], block_size: int, num_blocks: int, num_lanes: int
    ) -> None:
        self._groups, self._size = groups, block_size
        self.ledger = BlockLedger(num_blocks, num_lanes)
        self.live: dict[int, Live] = {}

    def begin(self, plan: StepPlan) -> None:
        """Take in what a plan says: who ended, who is new, which tokens were chosen, and blocks
        that are empty unless the prefix cache gave them."""
        for seq_id in plan.finished:
            live = self.live.pop(seq_id, None)
            if live is not None and live.lane is not None:
                live.lane.finished.append(seq_id)
        for new in plan.new:
            self.live[new.seq_id] = Live(new)
        for share in plan.scheduled:
            live, num_given = self.live[share.seq_id], 0
            live.generated += share.new_tokens
            if not live.blocks:
                live.blocks = [[] for _ in self._groups]
                num_given = share.num_computed // self._size
            # a plan may leave the lists out where no group gets a block
            for row, blocks in zip(live.blocks, share.new_blocks, strict=False):
                for index, block in enumerate(blocks):
                    if block >= 0 and index >= num_given:
                        self.ledger.renew(block)
                row += blocks

    def lane_for(self, lanes: Sequence[AnyLane], share: ScheduledSequence) -> AnyLane:
        """Which of all lanes, the decode side's first, runs a share: the one behind whose step it
        comes; the decode side for a decode, and for a prompt where no other is left; else the one
        that has the prompt, or that has least to do and to be given before it."""
        live = self.live[share.seq_id]
        known = None if live.lane is None else lanes[live.lane.index]
        if known is not None and known.is_alive and live.num_in_flight:
            return known
        decode, prefill = lanes[0], [lane for lane in lanes[1:] if lane.is_alive]
        if not share.is_prefill or not prefill:
            return decode
        if known in prefill:
            return known
        return min(prefill, key=lambda lane: lane.num_queued_tokens + self.num_lacking(lane, share))

    def give(
        self,
        lanes: Sequence[Lane],
        lane: Lane,
        shares: Sequence[ScheduledSequence],
        *,
        again: bool = False,
    ) -> tuple[dict[int, list[Held]], list[tuple[NewSequence | None, ScheduledSequence]]]:
        """Give shares to a lane -> (by the index of another lane, what has to come from it first;
        the shares as ``hand_on`` tells them). Raises EngineDeadError where no lane has it."""
        needs: dict[int, dict[Held, None]] = {}
        told = []
        for share in shares:
            for held in self.lacking(lane, share.seq_id, share.num_computed):
                needs.setdefault(self._source(lanes, held, lane).index, {})[held] = None
                self.ledger.receive(lane.index, held)
            told.append(self.hand_on(lane, share, again=again))
        return {source: list(wanted) for source, wanted in needs.items()}, told

    def _source(self, lanes: Sequence[Lane], held: Held, lane: Lane) -> Lane:
        """A lane that holds what another one lacks: the decode side, if it does."""
        for other in lanes:
            tokens = self.ledger.tokens(other.index, held.block)
            if other is not lane and other.is_alive and tokens >= held.tokens:
                return other
        raise EngineDeadError(f"{lane.name} needs tokens of block {held.block} that no side holds")

    def lacking(self, lane: Lane, seq_id: int, end: int) -> list[Held]:
        """What a query at position ``end`` sees of a sequence and a lane does not hold: nothing
        where the lane has it already, since it was given all before it ran the first share."""
        live, size, found = self.live[seq_id], self._size, []
        if live.lane is lane:
            return []
        for group, (row, kind) in enumerate(zip(live.blocks, self._groups, strict=True)):
            for index in range(kind.first_block(end, size), -(-end // size)):
                tokens = min(size, end - index * size)
                if row[index] >= 0 and self.ledger.tokens(lane.index, row[index]) < tokens:
                    found.append(self.ledger.held(group, row[index], tokens))
        return found

    def num_lacking(self, lane: Lane, share: ScheduledSequence) -> int:
        """Tokens that would have to cross before a lane could run this share."""
        return sum(
            held.tokens - self.ledger.tokens(lane.index, held.block)
            for held in self.lacking(lane, share.seq_id, share.num_computed)
        )

    def hand_on(
        self, lane: Lane, share: ScheduledSequence, *, again: bool
    ) -> tuple[NewSequence | None, ScheduledSequence]:
        """A share as a lane is told it, and the whole sequence where the lane does not know it. The
        ledger counts what the share computes. ``again``: it ran elsewhere, perhaps with others
        behind it, whose blocks come with them."""
        live = self.live[share.seq_id]
        new, new_tokens, rows = None, share.new_tokens, share.new_blocks
        end = share.num_computed + share.num_tokens
        if live.lane is not lane:
            if live.lane is not None:
                live.lane.finished.append(share.seq_id)
            live.lane, live.num_told = lane, [0] * len(self._groups)
            new, new_tokens = live.new, []
            if live.generated:
                token_ids = [*live.new.token_ids, *live.generated]
                new = msgspec.structs.replace(live.new, token_ids=token_ids)
            rows = [
                self._seen(live.blocks[group], kind, share.num_computed, end if again else None)
                for group, kind in enumerate(self._groups)
            ]
        live.num_in_flight += 1
        told = []
        for group, row in enumerate(rows):
            told.append(lane.blocks.table(row, live.num_told[group]))
            live.num_told[group] += len(told[group])
        self._run(lane, live, share.num_computed, end)
        return new, msgspec.structs.replace(share, new_blocks=told, new_tokens=new_tokens)

    def _seen(self, row: list[int], kind: KvGroup, start: int, end: int | None) -> list[int]:
        """A row of the block table, without what the window has left: those blocks may be others'
        by now."""
        first = min(kind.first_block(start, self._size), len(row))
        last = len(row) if end is None else -(-end // self._size)
        return [-1] * first + row[first:last]

    def _run(self, lane: Lane, live: Live, start: int, end: int) -> None:
        size = self._size
        for row in live.blocks:
            for index in range(start // size, -(-end // size)):
                first = index * size
                if row[index] >= 0:
                    begin = max(0, start - first)
                    self.ledger.run(lane.index, row[index], begin, min(size, end - first))
