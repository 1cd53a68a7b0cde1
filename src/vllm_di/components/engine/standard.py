"""The loop: schedule, run, take the result."""

from __future__ import annotations

from vllm_di.components.interfaces import Engine, Executor, KvCacheManager, Scheduler
from vllm_di.components.messages import EngineOutputs, EngineRequest, WorkerReport


class StandardEngine(Engine):
    """One step at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        kv_cache_manager: KvCacheManager,
        executor: Executor,
        worker_report: WorkerReport,
    ) -> None:
        self.report = worker_report
        self._scheduler, self._kv, self._executor = scheduler, kv_cache_manager, executor

    def add(self, request: EngineRequest) -> None:
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self._scheduler.has_work()

    def step(self) -> EngineOutputs:
        plan = self._scheduler.schedule()
        if plan is None:
            return EngineOutputs(outputs=[], stats=self._scheduler.stats())
        result = self._executor.submit(plan).result()
        outputs = self._scheduler.update(plan, result)
        return EngineOutputs(outputs=outputs, stats=self._scheduler.stats())

    def reset_prefix_cache(self) -> None:
        self._kv.reset_prefix_cache()
