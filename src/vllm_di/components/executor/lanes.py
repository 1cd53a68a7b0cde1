"""The workers of one side of a hand-over, and the thread that makes all calls to them in order."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from vllm_di.components.executor.side_blocks import Held, SideBlocks
from vllm_di.components.interfaces import Executor
from vllm_di.components.messages import KvParcel, StepPlan, StepResult
from vllm_di.errors import EngineDeadError

CLOSE_SECONDS = 5.0


class Task(ABC):
    """One thing that a lane is asked to do."""

    @abstractmethod
    def run(self) -> None:
        """On the lane's thread. What it raises ends the lane."""

    @abstractmethod
    def lost(self, error: Exception) -> None:
        """The lane has ended, and this was not done."""


class Lane:
    """Steps and hand-overs of one side, each after those before it."""

    blocks: SideBlocks

    def __init__(self, name: str, index: int, executor: Executor) -> None:
        self.name, self.index, self.executor = name, index, executor
        self.error: Exception | None = None
        """Why its workers are gone."""
        self.finished: list[int] = []
        """Sequences that its workers are to forget with the next plan."""
        self.parts: list[Any] = []
        """Parts of steps that are not done, the oldest first."""
        self.num_queued_tokens = 0
        """Of these parts."""
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._taken: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def is_alive(self) -> bool:
        return self.error is None

    def open(self, on_end: Callable[[Lane, Task, Exception], None]) -> None:
        """Start the thread. ``on_end`` is told which task ended the lane; the thread goes on and
        hands it every later task too."""
        self._thread = threading.Thread(
            target=self._run, args=(on_end,), name=self.name, daemon=True
        )
        self._thread.start()

    def put(self, task: Task) -> None:
        self._tasks.put(task)

    def drain(self) -> list[Task]:
        """Take back what has not begun."""
        tasks: list[Task] = []
        is_closing = False
        with suppress(queue.Empty):
            while True:
                task = self._tasks.get_nowait()
                if task is None:
                    is_closing = True
                else:
                    tasks.append(task)
        if is_closing:
            self._tasks.put(None)  # the thread has yet to end
        return tasks

    def close(self) -> None:
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(CLOSE_SECONDS)
            self._thread = None
        for task in self.drain():
            task.lost(EngineDeadError("the workers are closed"))
        self.executor.close()

    # -- on its thread ------------------------------------------------------------------------

    def _run(self, on_end: Callable[[Lane, Task, Exception], None]) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if self.error is not None:
                    raise self.error
                task.run()
            except Exception as error:
                on_end(self, task, error)

    def execute(self, plan: StepPlan) -> StepResult:
        return self.executor.submit(plan).result()

    def offer(self, held: Sequence[Held]) -> list[KvParcel]:
        """A parcel of each worker."""
        taken = []
        while not self._taken.empty():
            taken.append(self._taken.get())
        return self.executor.collective("kv_offer", self.blocks.spans(held), taken)

    def take(
        self, held: Sequence[Held], parcels: Sequence[KvParcel], skipped: Sequence[Held] = ()
    ) -> str:
        """Nothing, or why the parcels could not be had."""
        spans = self.blocks.spans(held, skipped)
        reasons: list[str] = self.executor.collective("kv_take", spans, list(parcels))
        return next(filter(None, reasons), "")

    def release(self, parcels: Sequence[KvParcel]) -> None:
        """Of this lane, taken by another: called from that one's thread."""
        for parcel in parcels:
            self._taken.put(parcel.ticket)


class Offer(Task):
    """Blocks that another lane waits for."""

    def __init__(self, lane: Lane, held: Sequence[Held]) -> None:
        self.lane, self.held = lane, held
        self.parcels: Future[list[KvParcel]] = Future()
        self._is_released = False

    def run(self) -> None:
        self.parcels.set_result(self.lane.offer(self.held))

    def release(self) -> None:
        """Nobody takes it, or takes it again: its memory is free once it is there. Tickets are used
        again, so each is given back once."""
        if not self._is_released:
            self._is_released = True
            self.parcels.add_done_callback(self._give_back)

    def _give_back(self, parcels: Future[list[KvParcel]]) -> None:
        if parcels.exception() is None:
            self.lane.release(parcels.result())

    def lost(self, error: Exception) -> None:
        if not self.parcels.done():
            self.parcels.set_exception(error)


class Joined:
    """The result of a step that several lanes share."""

    def __init__(self, step: int, future: Future[StepResult]) -> None:
        self.step, self._future = step, future
        self._lock = threading.Lock()
        self._missing = 0
        self._results: list[StepResult] = []

    def expect(self, more: int) -> None:
        with self._lock:
            self._missing += more

    def deliver(self, result: StepResult) -> None:
        with self._lock:
            self._missing -= 1
            self._results.append(result)
            if not self._missing and not self._future.done():
                self._future.set_result(self._together())

    def fail(self, error: Exception) -> None:
        with self._lock:
            if not self._future.done():
                self._future.set_exception(error)

    def _together(self) -> StepResult:
        results = self._results
        if len(results) == 1:
            return results[0]
        failed: dict[int, str] = {}
        for result in results:
            failed |= result.failed
        return StepResult(
            self.step,
            tokens=[token for r in results for token in r.tokens],
            prompt_logprobs=[scores for r in results for scores in r.prompt_logprobs],
            failed=failed,
            refused=[seq_id for r in results for seq_id in r.refused],
            num_compiles=sum(r.num_compiles for r in results),
        )
