"""An executor that is another one, with something added."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from vllm_di.components.interfaces import Executor
from vllm_di.components.messages import Peer, StepPlan, StepResult, WorkerReport


class ForwardingExecutor(Executor):
    """Passes every call on to ``inner``."""

    def __init__(self, inner: Executor) -> None:
        self.inner, self.depth, self.patience = inner, inner.depth, inner.patience

    def start(self) -> WorkerReport:
        return self.inner.start()

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        return self.inner.submit(plan)

    def collective(self, method: str, *args: Any) -> list[Any]:
        return self.inner.collective(method, *args)

    def check_alive(self) -> None:
        self.inner.check_alive()

    def processes(self) -> list[Peer]:
        return self.inner.processes()

    def close(self) -> None:
        self.inner.close()
