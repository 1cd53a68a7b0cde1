"""One process for each rank; commands go to all, answers are awaited in rank order."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import Annotated, Any

import msgspec

from vllm_di.components.executor import rpc
from vllm_di.components.executor.processes import (
    CLOSE_SECONDS,
    CODEC,
    GRACE_SECONDS,
    WorkerProcess,
    answers,
    connect,
    value,
)
from vllm_di.components.heartbeat import Listener
from vllm_di.components.interfaces import Executor, Placement, WorkerLauncher
from vllm_di.components.kv_groups import group_layers, sized
from vllm_di.components.messages import (
    CacheSize,
    Peer,
    StepInput,
    StepPlan,
    StepResult,
    WorkerReport,
)
from vllm_di.components.transport import GroupStore
from vllm_di.errors import ConfigError

Seconds = Annotated[float, msgspec.Meta(gt=0)]
CALLABLE = {
    "load": rpc.Load,
    "prepare": rpc.Prepare,
    "allocate": rpc.Allocate,
    "execute": rpc.Execute,
}
"""The worker's methods that may be called from here: nothing else crosses."""


class MultiprocessExecutor(Executor):
    """Starts worker processes and drives them over Unix sockets."""

    def __init__(
        self,
        launcher: WorkerLauncher,
        *,
        tensor_parallel_size: Annotated[int, msgspec.Meta(ge=1, le=64)],
        start_timeout: Seconds,
        step_timeout: Seconds,
    ) -> None:
        self._launcher, self._world = launcher, tensor_parallel_size
        self._start_timeout, self._step_timeout = start_timeout, step_timeout
        self._store: GroupStore | None = None
        self._listener = Listener()
        self.patience = step_timeout + GRACE_SECONDS
        self._workers: list[WorkerProcess] = []
        self._plans: queue.SimpleQueue[tuple[StepPlan, Future[StepResult]] | None]
        self._plans = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> WorkerReport:
        try:
            self._spawn()
            reports: list[WorkerReport] = self._call(rpc.Load(), self._start_timeout)
            groups = group_layers([reports[0].kv_specs])
            sizes: list[CacheSize] = self._call(rpc.Prepare(groups), self._start_timeout)
            fewest = min(sizes, key=lambda size: size.num_blocks)  # ranks hold like shares
            report = sized(_agreed(reports), groups, [fewest])
            self._call(rpc.Allocate(report.num_blocks), self._start_timeout)
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._run_steps, name="executor", daemon=True)
        self._thread.start()
        return report

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        self._plans.put((plan, future))
        return future

    def collective(self, method: str, *args: Any) -> list[Any]:
        if method not in CALLABLE:
            raise ConfigError(f"workers have no method {method!r}; they have {', '.join(CALLABLE)}")
        return self._call(CALLABLE[method](*args), self._step_timeout)

    def check_alive(self) -> None:
        for worker in self._workers:
            worker.check_alive()

    def processes(self) -> list[Peer]:
        return [worker.peer() for worker in self._workers]

    def close(self) -> None:
        if self._thread is not None:
            self._plans.put(None)
            self._thread.join(CLOSE_SECONDS)
            self._thread = None
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.reap()
        self._workers = []
        self._listener.close()
        if self._store is not None:
            self._store.close()
            self._store = None

    # -- inside -------------------------------------------------------------------------------

    def _spawn(self) -> None:
        self._store = GroupStore()
        meeting = self._store.address if self._world > 1 else ""
        for rank in range(self._world):
            placement = Placement(rank, self._world, meeting)
            worker = WorkerProcess(
                self._launcher,
                placement,
                f"worker {rank}",
                start_timeout=self._start_timeout,
                step_timeout=self._step_timeout,
                listener=self._listener,
            )
            self._workers.append(worker)
        connect(self._workers, self._start_timeout)

    def _call(self, command: rpc.Command, timeout: float) -> list[Any]:
        """One command to every rank, the answers in rank order. Raises a rank's failure."""
        frame = CODEC.frame(command)
        for worker in self._workers:
            worker.send(frame)
        return [value(answer) for answer in answers(self._workers, timeout)]

    def _run_steps(self) -> None:
        """The thread that talks to the workers, one step after the other."""
        while (item := self._plans.get()) is not None:
            plan, future = item
            try:
                future.set_result(self._call(rpc.Execute(StepInput(plan)), self._step_timeout)[0])
            except BaseException as error:
                future.set_exception(error)


def _agreed(reports: list[WorkerReport]) -> WorkerReport:
    """Rank 0's report with what is true of all: everybody's weights and details."""
    return msgspec.structs.replace(
        reports[0],
        weight_bytes=sum(r.weight_bytes for r in reports),
        details=reports[0].details | {"ranks": [r.details for r in reports]},
    )
