"""``executor=disaggregated`` in virtual time: its lanes, its ledger and its choice of a lane, with
steps and hand-overs that take measured and stated times.

A hand-over takes its bytes over the bandwidth, and the side that takes it does nothing else
meanwhile, as the executor's lanes do one thing at a time. The copy out of the side that gives is
not counted apart.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from vllm_di.components.executor.disaggregated import STEPS_AHEAD
from vllm_di.components.executor.lanes import Lane
from vllm_di.components.executor.sequence_book import SequenceBook
from vllm_di.components.executor.side_blocks import Held, SideBlocks
from vllm_di.components.interfaces import Executor
from vllm_di.components.messages import ScheduledSequence, StepPlan, StepResult, WorkerReport
from vllm_di.errors import ConfigError
from vllm_di.simulation.executors import Clock, Timer, result_of


class VirtualLane(Lane):
    """One side. It has no thread: the executor takes its tasks one after the other."""

    def __init__(self, name: str, index: int, timer: Timer, blocks: SideBlocks) -> None:
        super().__init__(name, index, _NoWorkers())
        self.timer, self.blocks = timer, blocks
        self.waiting: deque[Timed] = deque()
        self.current: Timed | None = None
        self.busy = 0.0
        """Seconds of steps and hand-overs so far."""


class Timed:
    """A task of a lane."""

    seconds = 0.0
    is_done = False

    def __init__(self, needs: Sequence[Timed] = ()) -> None:
        self.needs = needs
        """Tasks of other lanes that come before it."""


class Part(Timed):
    """What one lane runs of a step."""

    def __init__(
        self,
        lane: VirtualLane,
        future: StepFuture,
        shares: Sequence[ScheduledSequence],
        needs: Sequence[Timed],
    ) -> None:
        super().__init__(needs)
        self.lane, self.future, self.shares = lane, future, shares
        self.num_tokens = sum(share.num_tokens for share in shares)


class Crossing(Timed):
    """What a prompt's step wrote, on its way to the decode side."""

    def __init__(self, part: Part, held: Sequence[Held], seconds: float) -> None:
        super().__init__()
        self.part, self.held, self.seconds = part, held, seconds


class StepFuture(Future[StepResult]):
    """The result of a step, which is known at once; whether it is there yet, the lanes say."""

    def __init__(self, owner: SimulatedSplit, result: StepResult, num_parts: int) -> None:
        super().__init__()
        self._owner, self.num_missing = owner, num_parts
        self.set_result(result)

    def done(self) -> bool:
        """Whether it is among the next to be done: time moves on to then."""
        self._owner.move_on()
        return not self.num_missing

    def result(self, timeout: float | None = None) -> StepResult:
        while self.num_missing:
            self._owner.finish_next()
        self._owner.taken(self)
        return super().result()


class SimulatedSplit(Executor):
    """Prompts on lanes of one kind, decodes on one lane of another."""

    def __init__(
        self,
        report: WorkerReport,
        timers: Sequence[Timer],
        block_sizes: Sequence[int],
        *,
        bytes_per_token: float,
        bandwidth: float,
        clock: Clock,
    ) -> None:
        """``report``: of all sides together. ``timers`` and ``block_sizes``: of the decode side,
        then of each replica of the other. ``bandwidth``: bytes a second between two sides."""
        self._report, self._clock = report, clock
        self._token_seconds = bytes_per_token / bandwidth
        names = ["decode", *(f"prefill {index}" for index in range(len(timers) - 1))]
        self.lanes = [
            VirtualLane(
                name, index, timer, SideBlocks(report.block_size, own, report.max_model_len)
            )
            for index, (name, timer, own) in enumerate(zip(names, timers, block_sizes, strict=True))
        ]
        self._decode, self._prefill = self.lanes[0], self.lanes[1:]
        self.depth = 1 + STEPS_AHEAD * len(self._prefill)
        self._book = SequenceBook(
            report.kv_groups, report.block_size, report.num_blocks, len(self.lanes)
        )
        self._ends: list[tuple[float, int, VirtualLane]] = []
        """When each lane's task ends; a heap."""
        self._numbers = itertools.count()
        self._open: set[StepFuture] = set()
        self.num_crossed = 0
        """Tokens that crossed, either way."""

    def start(self) -> WorkerReport:
        return self._report

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        self._book.begin(plan)
        apart: dict[tuple[int, bool], list[ScheduledSequence]] = {}
        for share in plan.scheduled:
            apart.setdefault(
                (self._book.lane_for(self.lanes, share).index, share.is_prefill), []
            ).append(share)
        future = StepFuture(self, result_of(plan.step, plan.scheduled), len(apart))
        self._open.add(future)
        for (index, _), shares in sorted(apart.items(), key=lambda item: item[0]):
            self._place(future, self.lanes[index], shares)
        self._start_tasks(self._clock.now)
        return future

    def collective(self, method: str, *args: Any) -> list[Any]:
        raise ConfigError(f"a simulated worker answers no call, and {method!r} was made")

    @property
    def busy(self) -> float:
        """Seconds that a lane was busy, on the mean."""
        return sum(lane.busy for lane in self.lanes) / len(self.lanes)

    def move_on(self) -> None:
        """To where one step at least is done."""
        while all(future.num_missing for future in self._open):
            self.finish_next()

    def taken(self, future: StepFuture) -> None:
        self._open.discard(future)

    # -- as DisaggregatedExecutor does it -----------------------------------------------------

    def _place(
        self, future: StepFuture, lane: VirtualLane, shares: Sequence[ScheduledSequence]
    ) -> None:
        needs, told = self._book.give(self.lanes, lane, shares)
        offers, crossed = [], 0
        for source, wanted in needs.items():
            offer = Timed()
            self.lanes[source].waiting.append(offer)
            offers.append(offer)
            crossed += sum(held.tokens for held in wanted)
        self.num_crossed += crossed
        part = Part(lane, future, shares, offers)
        plan = StepPlan(0, [], [handed for _, handed in told], [])
        part.seconds = crossed * self._token_seconds + lane.timer.seconds(plan)
        lane.num_queued_tokens += part.num_tokens
        lane.waiting.append(part)

    # -- events -------------------------------------------------------------------------------

    def _start_tasks(self, now: float) -> None:
        """On every lane that is free, the next task whose needs are there."""
        for lane in self.lanes:
            if lane.current is None and lane.waiting:
                task = lane.waiting[0]
                if all(need.is_done for need in task.needs):
                    lane.waiting.popleft()
                    lane.current = task
                    lane.busy += task.seconds
                    heapq.heappush(self._ends, (now + task.seconds, next(self._numbers), lane))

    def finish_next(self) -> None:
        """Move time on to the end of the next task."""
        end, _, lane = heapq.heappop(self._ends)
        self._clock.now = max(self._clock.now, end)
        task, lane.current = lane.current, None
        assert task is not None
        task.is_done = True
        if isinstance(task, Part):
            held = self._wanted(task) if lane is not self._decode else []
            if held:
                tokens = sum(one.tokens for one in held)
                self.num_crossed += tokens
                self._decode.waiting.append(Crossing(task, held, tokens * self._token_seconds))
            else:
                self._done(task)
        elif isinstance(task, Crossing):
            for one in task.held:
                if self._book.ledger.is_current(one):
                    self._book.ledger.receive(self._decode.index, one)
            self._done(task.part)
        self._start_tasks(end)

    def _wanted(self, part: Part) -> list[Held]:
        """What the decode side does not hold of what the step wrote or found."""
        found: dict[Held, None] = {}
        for share in part.shares:
            if share.seq_id in self._book.live:
                end = share.num_computed + share.num_tokens
                lacking = self._book.lacking(self._decode, share.seq_id, end)
                found |= dict.fromkeys(lacking)
        return list(found)

    def _done(self, part: Part) -> None:
        part.lane.num_queued_tokens -= part.num_tokens
        for share in part.shares:
            if (live := self._book.live.get(share.seq_id)) is not None:
                live.num_in_flight -= 1
        part.future.num_missing -= 1


class _NoWorkers(Executor):
    """In place of a lane's own executor."""

    def start(self) -> WorkerReport:
        raise AssertionError("a virtual lane starts no workers")

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        raise AssertionError("a virtual lane runs its steps itself")

    def collective(self, method: str, *args: Any) -> list[Any]:
        raise ConfigError(f"a simulated worker answers no call, and {method!r} was made")
