"""One worker in the engine's own process."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import ExitStack
from typing import Annotated, Any

import msgspec

from vllm_di.components.interfaces import Executor, Placement, Worker, WorkerLauncher
from vllm_di.components.messages import StepPlan, StepResult, WorkerReport


class InlineExecutor(Executor):
    """Calls the worker directly: no copy, no process, no wait."""

    _worker: Worker

    def __init__(
        self,
        launcher: WorkerLauncher,
        *,
        step_timeout: Annotated[float, msgspec.Meta(gt=0)] = 300.0,
    ) -> None:
        self._launcher, self.patience = launcher, step_timeout
        self._stack = ExitStack()

    def start(self) -> WorkerReport:
        self._worker = self._stack.enter_context(self._launcher.open(Placement()))
        report = self._worker.load()
        self._worker.allocate(report.num_blocks)
        return report

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        future.set_result(self._worker.execute(plan))
        return future

    def collective(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self._worker, method)(*args)]

    def close(self) -> None:
        self._stack.close()
