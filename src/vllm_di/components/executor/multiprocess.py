"""One process for each rank: a call goes to all, their results come in rank order."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import Annotated, Any

import msgspec

from vllm_di.components.executor.methods import StageMethods
from vllm_di.components.executor.processes import (
    CLOSE_SECONDS,
    GRACE_SECONDS,
    HostFor,
    ThisHost,
    WorkerHost,
    WorkerProcess,
    answers,
    called,
    connect,
)
from vllm_di.components.executor.rpc import Call, result
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
from vllm_di.components.warm_ups import warmed
from vllm_di.errors import EngineDeadError

Seconds = Annotated[float, msgspec.Meta(gt=0)]


class MultiprocessExecutor(Executor):
    """Starts worker processes and drives them over sockets."""

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
        self._names = [called(launcher, f"worker {rank}") for rank in range(self._world)]
        self._methods = StageMethods(launcher)
        self._execute = self._methods.call("execute")
        self._host: WorkerHost = ThisHost()
        self._listener = Listener()
        self.patience = step_timeout + GRACE_SECONDS
        self._workers: list[WorkerProcess] = []
        self._calls: queue.SimpleQueue[tuple[Call, bytes | StepPlan, Future[Any]] | None]
        self._calls = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run_on(self, host_for: HostFor) -> None:
        self._host = host_for(self._launcher, self._names)

    def start(self) -> WorkerReport:
        try:
            self._spawn()
            reports: list[WorkerReport] = self._start_call("load")
            groups = group_layers([reports[0].kv_specs])
            sizes: list[CacheSize] = self._start_call("prepare", groups)
            fewest = min(sizes, key=lambda size: size.num_blocks)  # ranks hold like shares
            report = sized(_agreed(reports), groups, [fewest])
            report = warmed(report, self._start_call("allocate", report.num_blocks))
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._run_calls, name="executor", daemon=True)
        self._thread.start()
        return report

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        self._calls.put((self._execute, plan, future))
        return future

    def collective(self, method: str, *args: Any) -> list[Any]:
        call = self._methods.call(method)
        if self._thread is None:
            raise EngineDeadError("the workers are not running")
        future: Future[list[Any]] = Future()
        self._calls.put((call, call.checked_frame(args), future))
        return future.result()

    def check_alive(self) -> None:
        for worker in self._workers:
            worker.check_alive()

    def processes(self) -> list[Peer]:
        return [worker.peer() for worker in self._workers]

    def close(self) -> None:
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join(CLOSE_SECONDS)
            self._thread = None
            while not self._calls.empty():  # a collective of another thread must not wait forever
                if (item := self._calls.get()) is not None:
                    item[2].set_exception(EngineDeadError("the workers are closed"))
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.reap()
        self._workers = []
        self._listener.close()
        self._host.close()

    # -- inside -------------------------------------------------------------------------------

    def _spawn(self) -> None:
        placements = [Placement(rank, self._world) for rank in range(self._world)]
        for worker in self._host.start(self._launcher, placements, self._names, self._listener):
            self._workers.append(worker)
        connect(self._workers, self._start_timeout)

    def _start_call(self, method: str, *args: Any) -> list[Any]:
        """Before the thread runs."""
        call = self._methods.call(method)
        with self._launcher.placed(0):
            return self._send(call, call.frame(*args), self._start_timeout)

    def _send(self, call: Call, frame: bytes, timeout: float) -> list[Any]:
        """A call to every rank -> results in rank order. Raises a rank's failure."""
        for worker in self._workers:
            worker.send(frame)
        return [result(answer) for answer in answers(self._workers, call, timeout)]

    def _run_calls(self) -> None:
        """The thread that talks to the workers, one call after the other."""
        while (item := self._calls.get()) is not None:
            call, payload, future = item
            try:
                if isinstance(payload, bytes):
                    future.set_result(self._send(call, payload, self._step_timeout))
                else:
                    frame = call.frame(StepInput(payload.packed()))
                    future.set_result(self._send(call, frame, self._step_timeout)[0])
            except BaseException as error:
                future.set_exception(error)


def _agreed(reports: list[WorkerReport]) -> WorkerReport:
    """Rank 0's report, with the weights and details of all ranks."""
    return msgspec.structs.replace(
        reports[0],
        weight_bytes=sum(r.weight_bytes for r in reports),
        details=reports[0].details | {"ranks": [r.details for r in reports]},
    )
