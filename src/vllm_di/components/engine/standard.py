"""The loop: schedule, run, take the result."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait

from vllm_di.components.interfaces import Engine, Executor, KvCacheManager, Scheduler
from vllm_di.components.messages import (
    EngineOutputs,
    EngineRequest,
    Peer,
    StepPlan,
    StepResult,
    WorkerReport,
)
from vllm_di.errors import RequestError


class StandardEngine(Engine):
    """One step at a time, or as many as the executor keeps in flight."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)
    """Seconds, from any beginning."""

    def __init__(
        self,
        scheduler: Scheduler,
        kv_cache_manager: KvCacheManager,
        executor: Executor,
        worker_report: WorkerReport,
    ) -> None:
        self.report, self.patience = worker_report, executor.patience
        self._scheduler, self._kv, self._executor = scheduler, kv_cache_manager, executor
        self._in_flight: deque[tuple[StepPlan, float, Future[StepResult]]] = deque()
        """With the time of their start. The oldest first."""
        self._last_end = 0.0
        self._num_compiles = 0

    def check(self, request: EngineRequest) -> None:
        self._scheduler.check(request)

    def add(self, request: EngineRequest) -> None:
        if request.generated_token_ids and not self._scheduler.continues:
            raise RequestError(
                f"the engine that answered has ended, and {type(self._scheduler).__qualname__} "
                "cannot go on in the middle of an answer",
                status=500,
            )
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self._scheduler.has_work() or bool(self._in_flight)

    def step(self) -> EngineOutputs:
        while len(self._in_flight) < self.report.depth:
            plan = self._scheduler.schedule()
            if plan is None:
                break
            begin = self.clock()
            self._in_flight.append((plan, begin, self._executor.submit(plan)))
        outputs = []
        if self._in_flight:
            plan, begin, future = self._next_done()
            result = future.result()
            end = self.clock()
            if not result.num_compiles:  # a step that compiled tells nothing about the next
                # the workers took it up when it came, or when they had done the one before
                self._scheduler.timed(plan, end - max(begin, self._last_end))
            self._last_end = end
            self._num_compiles += result.num_compiles
            outputs = self._scheduler.update(plan, result)
        stats = self._scheduler.stats()
        stats.num_compiles = self._num_compiles
        return EngineOutputs(outputs=outputs, stats=stats)

    def _next_done(self) -> tuple[StepPlan, float, Future[StepResult]]:
        """The oldest step; where prompts run beside decodes, whichever is done first."""
        if not self.report.prefill_depth or len(self._in_flight) == 1:
            return self._in_flight.popleft()
        wait([future for _, _, future in self._in_flight], return_when=FIRST_COMPLETED)
        done = next(one for one in self._in_flight if one[2].done())
        self._in_flight.remove(done)
        return done

    def check_alive(self) -> None:
        self._executor.check_alive()

    def processes(self) -> list[Peer]:
        return self._executor.processes()

    def reset_prefix_cache(self) -> None:
        self._kv.reset_prefix_cache()
