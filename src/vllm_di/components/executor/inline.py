"""One worker in the engine's own process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Annotated, Any

import msgspec

from vllm_di.components.interfaces import Executor, Placement, Worker, WorkerLauncher
from vllm_di.components.kv_groups import group_layers, sized
from vllm_di.components.messages import StepInput, StepPlan, StepResult, WorkerReport
from vllm_di.components.remote import RemoteMethod, RemoteMethods
from vllm_di.components.warm_ups import warmed


class InlineExecutor(Executor):
    """Calls the worker directly: no copy, no process, no wait."""

    _worker: Worker
    _methods: RemoteMethods

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
        self._methods = RemoteMethods(type(self._worker))
        with self._launcher.placed(0):
            return start_alone(self._worker)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        return Done(self._worker.execute(StepInput(plan)))

    def collective(self, method: str, *args: Any) -> list[Any]:
        return [call_here(self._worker, self._methods[method], args)]

    def close(self) -> None:
        self._stack.close()


class Done(Future[StepResult]):
    """A result that is there already. The locks of a Future, which take 50 us when a step has
    emptied the caches, are made only for whoever asks for more than the result."""

    _is_whole = False

    def __init__(self, result: StepResult) -> None:
        self._there = result

    def result(self, timeout: float | None = None) -> StepResult:
        return self._there

    def __getattr__(self, name: str) -> Any:
        if self._is_whole:
            raise AttributeError(name)
        self._is_whole = True
        super().__init__()
        self.set_result(self._there)
        return getattr(self, name)


def call_here(worker: Worker, method: RemoteMethod, args: Sequence[Any]) -> Any:
    """Call a declared method of a worker in this process, with the checks of a call that crosses
    processes. Raises RequestError, PortError and what the method raises."""
    command = method.checked(args)
    result = getattr(worker, method.name)(*msgspec.structs.astuple(command))
    return method.checked_result(result)


def start_alone(worker: Worker) -> WorkerReport:
    """Bring a worker that has the whole model, on one rank, to where it can execute steps."""
    report = worker.load()
    groups = group_layers([report.kv_specs])
    size = worker.prepare(groups)
    report = sized(report, groups, [size])
    return warmed(report, [worker.allocate(size.num_blocks)])
