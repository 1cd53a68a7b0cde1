"""Prompts on workers of one role, tokens from those of another: the cache crosses between them.

The scheduler sees one cache. Each side, a *lane*, has all its blocks in memory of its own, and a
ledger says which tokens of a block lie where. What a prompt's step wrote crosses before its result
is given out, so the decode side holds every token of every finished step: a lane of prompts may end
at any time, and its steps run again elsewhere. What the prefix cache gives to a prompt and its lane
does not hold comes from the decode side first.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Annotated, Any

import msgspec

from vllm_di.components.executor.lanes import Joined, Lane, Offer, Task
from vllm_di.components.executor.multiprocess import MultiprocessExecutor
from vllm_di.components.executor.pipeline import PipelineExecutor
from vllm_di.components.executor.processes import HostFor
from vllm_di.components.executor.roles import Sides, joined_report
from vllm_di.components.executor.sequence_book import SequenceBook
from vllm_di.components.executor.side_blocks import Held
from vllm_di.components.interfaces import Executor, KvTransfer, WorkerLauncher
from vllm_di.components.messages import (
    KvParcel,
    Peer,
    ScheduledSequence,
    StepPlan,
    StepResult,
    WorkerReport,
)
from vllm_di.errors import EngineDeadError

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=64)]
STEPS_AHEAD = 2
"""Steps in flight on each lane of prompts: one runs while the cache of the one before crosses."""

log = logging.getLogger(__name__)


class DisaggregatedExecutor(Executor):
    """Splits each step into its prompts and its decodes, which run at the same time. Without a lane
    of prompts left, prompts run on the decode side; when that ends, the engine does."""

    known_roles = ("prefill", "decode")

    def __init__(
        self,
        launcher: WorkerLauncher,
        kv_transfer: KvTransfer,
        *,
        processes: bool,
        prefill_replicas: Count,
        prefill_tensor_parallel_size: Count,
        decode_tensor_parallel_size: Count,
        start_timeout: Seconds,
        step_timeout: Seconds,
    ) -> None:
        kv_transfer.check()
        self._launcher = launcher
        self._worlds = {
            "prefill": prefill_tensor_parallel_size,
            "decode": decode_tensor_parallel_size,
        }
        self._processes = processes
        self._start_timeout, self._step_timeout = start_timeout, step_timeout
        roles = ["decode", *["prefill"] * prefill_replicas]
        self._is_here = True
        """Whether the workers share this host's memory."""
        self._sides = [self._side(role) for role in roles]
        self._decode = Lane("decode", 0, self._sides[0])
        self._prefill = [
            Lane(f"prefill {index}", 1 + index, side) for index, side in enumerate(self._sides[1:])
        ]
        self._lanes = [self._decode, *self._prefill]
        self.depth = 1 + STEPS_AHEAD * prefill_replicas
        self.patience = sum(lane.executor.patience or 0.0 for lane in self._lanes)
        self._lock = threading.RLock()
        """Of everything below, and of the order of tasks in the lanes."""
        self._book: SequenceBook
        self._is_closing = False

    def run_on(self, host_for: HostFor) -> None:
        """The workers of all lanes are processes from now on, each with a part of its host's memory
        that the host knows."""
        self._is_here = False
        for side in self._sides:
            side.run_on(host_for)

    def _side(self, role: str) -> MultiprocessExecutor | PipelineExecutor:
        launcher = self._launcher.for_role(role)
        if self._worlds[role] > 1:
            return MultiprocessExecutor(
                launcher,
                tensor_parallel_size=self._worlds[role],
                start_timeout=self._start_timeout,
                step_timeout=self._step_timeout,
            )
        return PipelineExecutor(
            launcher,
            processes=self._processes,
            depth=None,
            start_timeout=self._start_timeout,
            step_timeout=self._step_timeout,
        )

    def start(self) -> WorkerReport:
        try:
            reports = [lane.executor.start() for lane in self._lanes]
            sides = Sides(self._launcher, self._worlds, reports[0], reports[1])
            sides.check()
            if self._is_here:
                sides.check_room(reports)
            session = secrets.token_bytes(32)
            sides.open(self._lanes, session)
        except BaseException:
            self.close()
            raise
        report = joined_report(sides, reports)
        report = msgspec.structs.replace(
            report, depth=self.depth, prefill_depth=STEPS_AHEAD * len(self._prefill)
        )
        self._book = SequenceBook(
            report.kv_groups, report.block_size, report.num_blocks, len(self._lanes)
        )
        for lane in self._lanes:
            lane.open(self._on_end)
        return report

    # -- steps --------------------------------------------------------------------------------

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        joined = Joined(plan.step, future)
        with self._lock:
            self._book.begin(plan)
            self._place(joined, plan.scheduled)
        return future

    def _place(
        self, joined: Joined, shares: Sequence[ScheduledSequence], *, again: bool = False
    ) -> None:
        """Share a step, or a part of one that has to run ``again``, out over the lanes. Prompts and
        decodes are apart even where one lane runs both: not every platform mixes them."""
        apart: dict[tuple[int, bool], list[ScheduledSequence]] = {}
        for share in shares:
            lane = self._book.lane_for(self._lanes, share)
            apart.setdefault((lane.index, share.is_prefill), []).append(share)
        joined.expect(len(apart))
        for (index, _), own in sorted(apart.items(), key=lambda item: item[0]):
            lane = self._lanes[index]
            part = Part(self, lane, joined, own)
            needs, told = self._book.give(self._lanes, lane, own, again=again)
            for source, wanted in needs.items():
                offer = Offer(self._lanes[source], wanted)
                self._lanes[source].put(offer)
                part.needs.append(offer)
            finished, lane.finished = lane.finished, []
            new = [one for one, _ in told if one is not None]
            part.plan = StepPlan(joined.step, new, [handed for _, handed in told], finished)
            lane.num_queued_tokens += part.num_tokens
            lane.parts.append(part)
            lane.put(part)

    # -- on the lanes' threads ----------------------------------------------------------------

    def run_part(self, part: Part) -> None:
        """Take what is lacking, run the step, and see that the decode side gets what a prompt
        wrote. Raises what ends the lane."""
        lane = part.lane
        for offer in part.needs:
            try:
                parcels = offer.parcels.result()
                why = lane.take(offer.held, parcels)
            except EngineDeadError as error:
                if offer.lane.is_alive:
                    raise
                why = str(error)
            if why and offer.lane.is_alive:
                raise EngineDeadError(f"{lane.name} cannot take what {offer.lane.name} has: {why}")
            if why:
                part.joined.fail(EngineDeadError(f"{offer.lane.name}: {why}"))
                return
            with self._lock:
                offer.release()
        result = lane.execute(part.plan)
        if lane is self._decode:
            self._done(part, result)
            return
        with self._lock:
            held = self._wanted(part, result)
        if not held:
            self._done(part, result)
            return
        parcels = lane.offer(held)
        with self._lock:
            skipped = [one for one in held if not self._book.ledger.is_current(one)]
            self._decode.put(Crossing(self, part, result, held, parcels, skipped))

    def _wanted(self, part: Part, result: StepResult) -> list[Held]:
        """What a prompt's step wrote, or found, and the decode side does not hold."""
        found: dict[Held, None] = {}
        for share in part.shares:
            if share.seq_id in self._book.live and share.seq_id not in result.failed:
                end = share.num_computed + share.num_tokens
                lacking = self._book.lacking(self._decode, share.seq_id, end)
                found |= dict.fromkeys(lacking)
        return list(found)

    def take_crossing(self, crossing: Crossing) -> None:
        """On the decode side's thread. Raises what ends the decode side."""
        part, held = crossing.part, crossing.held
        why = self._decode.take(held, crossing.parcels, crossing.skipped)
        if why:
            self._end(part.lane, EngineDeadError(f"{part.lane.name}: {why}"))
            return
        part.lane.release(crossing.parcels)
        with self._lock:
            for one in held:
                if self._book.ledger.is_current(one):
                    self._book.ledger.receive(self._decode.index, one)
        self._done(part, crossing.result)

    def _done(self, part: Part, result: StepResult) -> None:
        with self._lock:
            if part not in part.lane.parts:
                return  # it was moved to another lane meanwhile
            part.lane.parts.remove(part)
            part.lane.num_queued_tokens -= part.num_tokens
            for share in part.shares:
                if (live := self._book.live.get(share.seq_id)) is not None:
                    live.num_in_flight -= 1
        part.joined.deliver(result)

    # -- the end of a lane --------------------------------------------------------------------

    def _on_end(self, lane: Lane, task: Task, error: Exception) -> None:
        """On the lane's thread, for the task that failed and for every one after it."""
        self._end(lane, error)
        task.lost(lane.error or error)

    def _end(self, lane: Lane, error: Exception) -> None:
        with self._lock:
            if lane.error is not None:
                return
            dead = error if isinstance(error, EngineDeadError) else None
            lane.error = dead or EngineDeadError(f"{lane.name}: {type(error).__name__}: {error}")
            if self._is_closing:
                return
            left = [other for other in self._prefill if other.is_alive]
            unforeseen = None if dead else error
            if lane is self._decode:
                log.error("the decode side has ended: %s", lane.error, exc_info=unforeseen)
                for task in lane.drain():
                    task.lost(lane.error)
                return
            others = "another replica" if len(left) == 1 else f"{len(left)} other replicas"
            where = f"on {others}" if left else "on the decode side, more slowly"
            log.error(
                "%s has ended (%s): its prompts run again, and later ones run, %s, until the "
                "engine starts anew",
                lane.name,
                lane.error,
                where,
                exc_info=unforeseen,
            )
            for task in lane.drain():
                task.lost(lane.error)
            parts, lane.parts, lane.num_queued_tokens = lane.parts, [], 0
            for part in parts:
                self._move(part)
        # its processes may take seconds to end, and no step waits for that
        threading.Thread(
            target=lane.executor.close, name=f"end of {lane.name}", daemon=True
        ).start()

    def _move(self, part: Part) -> None:
        """Run a part of an ended lane elsewhere."""
        for offer in part.needs:
            offer.release()
        shares = [share for share in part.shares if share.seq_id in self._book.live]
        for share in shares:
            self._book.live[share.seq_id].num_in_flight -= 1
        self._place(part.joined, shares, again=True)
        part.joined.deliver(StepResult(part.joined.step, []))  # in place of what was lost

    # -- the rest of the interface ------------------------------------------------------------

    def collective(self, method: str, *args: Any) -> list[Any]:
        lanes = [*(lane for lane in self._prefill if lane.is_alive), self._decode]
        return [result for lane in lanes for result in lane.executor.collective(method, *args)]

    def check_alive(self) -> None:
        for lane in self._prefill:
            if lane.is_alive:
                try:
                    lane.executor.check_alive()
                except EngineDeadError as error:
                    self._end(lane, error)
        if self._decode.error is not None:
            raise self._decode.error
        self._decode.executor.check_alive()

    def processes(self) -> list[Peer]:
        return [peer for lane in self._lanes if lane.is_alive for peer in lane.executor.processes()]

    def close(self) -> None:
        self._is_closing = True
        with ExitStack() as stack:  # all of them, even when one raises
            for lane in self._lanes:
                stack.callback(lane.close)


class Part(Task):
    """What one lane runs of a step."""

    def __init__(
        self,
        owner: DisaggregatedExecutor,
        lane: Lane,
        joined: Joined,
        shares: Sequence[ScheduledSequence],
    ) -> None:
        self.lane, self.joined, self.shares = lane, joined, shares
        self.num_tokens = sum(share.num_tokens for share in shares)
        self.needs: list[Offer] = []
        """To be taken before the step."""
        self.plan: StepPlan
        """In the lane's own blocks."""
        self._owner = owner

    def run(self) -> None:
        self._owner.run_part(self)

    def lost(self, error: Exception) -> None:
        """Of a lane of prompts it was moved already, with all that were not done."""
        if self.lane.index == 0:
            self.joined.fail(error)


class Crossing(Task):
    """What a prompt's step wrote, on its way to the decode side."""

    def __init__(
        self,
        owner: DisaggregatedExecutor,
        part: Part,
        result: StepResult,
        held: list[Held],
        parcels: list[KvParcel],
        skipped: list[Held],
    ) -> None:
        self.part, self.result, self.held = part, result, held
        self.parcels, self.skipped = parcels, skipped
        self._owner = owner

    def run(self) -> None:
        self._owner.take_crossing(self)

    def lost(self, error: Exception) -> None:
        self.part.joined.fail(error)
