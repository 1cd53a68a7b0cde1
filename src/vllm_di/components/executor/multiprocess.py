"""One process for each rank; commands go to all, answers are awaited in rank order."""

from __future__ import annotations

import queue
import select
import socket
import subprocess
import threading
from concurrent.futures import Future
from typing import Annotated, Any

import msgspec

from vllm_di.components.executor import rpc
from vllm_di.components.interfaces import Executor, Placement, WorkerLauncher
from vllm_di.components.messages import StepPlan, StepResult, WorkerReport
from vllm_di.components.transport import Codec, Connection, Failure, Rendezvous
from vllm_di.errors import ConfigError, EngineDeadError

Seconds = Annotated[float, msgspec.Meta(gt=0)]
CALLABLE = {"load": rpc.Load, "allocate": rpc.Allocate, "execute": rpc.Execute}
"""The worker's methods that may be called from here: nothing else crosses."""
CLOSE_SECONDS = 5.0


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
        self._codec: Codec[rpc.Answer] = Codec(rpc.Answer)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._workers: list[Connection[rpc.Answer]] = []
        self._plans: queue.SimpleQueue[tuple[StepPlan, Future[StepResult]] | None]
        self._plans = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> WorkerReport:
        try:
            self._spawn()
            reports: list[WorkerReport] = self._call(rpc.Load(), self._start_timeout)
            report = _agreed(reports)
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
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                raise EngineDeadError(f"worker {rank} {_ending(process)}")

    def close(self) -> None:
        if self._thread is not None:
            self._plans.put(None)
            self._thread.join(CLOSE_SECONDS)
            self._thread = None
        for worker in self._workers:
            try:
                worker.send(rpc.Close())
            except OSError:
                continue  # it is gone already
            finally:
                worker.close()
        for process in self._processes:
            _reap(process)
        self._workers, self._processes = [], []

    # -- inside -------------------------------------------------------------------------------

    def _spawn(self) -> None:
        meeting = f"tcp://127.0.0.1:{_free_port()}" if self._world > 1 else ""
        rendezvous = Rendezvous()
        try:
            for rank in range(self._world):
                placement = Placement(rank, self._world, meeting)
                command, assembly = self._launcher.command(placement, rendezvous.address)
                process = subprocess.Popen(command, stdin=subprocess.PIPE)
                self._processes.append(process)
                assert process.stdin is not None
                process.stdin.write(assembly)
                process.stdin.close()
            rank_of = {}
            while len(self._workers) < self._world:
                connection = self._accept(rendezvous)
                self._workers.append(connection)
                hello = connection.receive()
                if isinstance(hello, Failure):
                    raise hello.error()
                assert isinstance(hello, rpc.Hello)
                rank_of[connection] = hello.rank
            self._workers.sort(key=rank_of.__getitem__)
        finally:
            rendezvous.close()

    def _accept(self, rendezvous: Rendezvous) -> Connection[rpc.Answer]:
        """The next worker to connect; notices one that dies before."""
        waited = 0.0
        while waited < self._start_timeout:
            if select.select([rendezvous.socket], [], [], 0.2)[0]:
                sock, _ = rendezvous.socket.accept()
                sock.settimeout(self._start_timeout)
                return Connection(sock, self._codec)
            self.check_alive()
            waited += 0.2
        raise EngineDeadError(f"a worker did not start within {self._start_timeout:.0f} s")

    def _call(self, command: rpc.Command, timeout: float) -> list[Any]:
        """One command to every rank, the answers in rank order. Raises the first rank's failure."""
        frame = self._codec.frame(command)
        for rank, worker in enumerate(self._workers):
            try:
                worker.send_frame(frame)
            except OSError as error:
                raise self._lost(rank, str(error)) from None
        answers = [self._answer(rank, timeout) for rank in range(len(self._workers))]
        for answer in answers:
            if isinstance(answer, Failure):
                raise answer.error()
        return [_value(answer) for answer in answers]

    def _answer(self, rank: int, timeout: float) -> rpc.Answer:
        worker = self._workers[rank]
        worker.socket.settimeout(timeout)
        try:
            return worker.receive()
        except TimeoutError:
            raise EngineDeadError(f"worker {rank} gave no answer for {timeout:.0f} s") from None
        except (EngineDeadError, OSError) as error:
            raise self._lost(rank, str(error)) from None

    def _lost(self, rank: int, why: str) -> EngineDeadError:
        process = self._processes[rank]
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            return EngineDeadError(f"worker {rank}: {why}")
        return EngineDeadError(f"worker {rank} {_ending(process)}")

    def _run_steps(self) -> None:
        """The thread that talks to the workers, one step after the other."""
        while (item := self._plans.get()) is not None:
            plan, future = item
            try:
                future.set_result(self._call(rpc.Execute(plan), self._step_timeout)[0])
            except BaseException as error:
                future.set_exception(error)


def _value(answer: rpc.Answer) -> Any:
    if isinstance(answer, rpc.Report):
        return answer.report
    if isinstance(answer, rpc.Result):
        return answer.result
    return answer.value if isinstance(answer, rpc.Done) else None


def _agreed(reports: list[WorkerReport]) -> WorkerReport:
    """Rank 0's report with what is true of all: the fewest blocks, everybody's details."""
    return msgspec.structs.replace(
        reports[0],
        num_blocks=min(r.num_blocks for r in reports),
        weight_bytes=sum(r.weight_bytes for r in reports),
        details=reports[0].details | {"ranks": [r.details for r in reports]},
    )


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"


def _reap(process: subprocess.Popen[bytes]) -> None:
    for signal in (None, process.terminate, process.kill):
        if signal is not None:
            signal()
        try:
            process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return
