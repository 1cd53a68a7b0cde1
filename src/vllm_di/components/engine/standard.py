"""The loop: schedule, run, take the result."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

from vllm_di.components.interfaces import Engine, Executor, KvCacheManager, Scheduler
from vllm_di.components.messages import (
    EngineOutputs,
    EngineRequest,
    Peer,
    StepPlan,
    StepResult,
    WorkerReport,
)


class StandardEngine(Engine):
    """One step at a time, or as many as the executor keeps in flight."""

    def __init__(
        self,
        scheduler: Scheduler,
        kv_cache_manager: KvCacheManager,
        executor: Executor,
        worker_report: WorkerReport,
    ) -> None:
        self.report, self.patience = worker_report, executor.patience
        self._scheduler, self._kv, self._executor = scheduler, kv_cache_manager, executor
        self._in_flight: deque[tuple[StepPlan, Future[StepResult]]] = deque()
        """The oldest first."""
        self._num_compiles = 0

    def check(self, request: EngineRequest) -> None:
        self._scheduler.check(request)

    def add(self, request: EngineRequest) -> None:
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
            self._in_flight.append((plan, self._executor.submit(plan)))
        outputs = []
        if self._in_flight:
            plan, future = self._in_flight.popleft()
            result = future.result()
            self._num_compiles += result.num_compiles
            outputs = self._scheduler.update(plan, result)
        stats = self._scheduler.stats()
        stats.num_compiles = self._num_compiles
        return EngineOutputs(outputs=outputs, stats=stats)

    def check_alive(self) -> None:
        self._executor.check_alive()

    def processes(self) -> list[Peer]:
        return self._executor.processes()

    def reset_prefix_cache(self) -> None:
        self._kv.reset_prefix_cache()
