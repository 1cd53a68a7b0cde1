"""One worker in a process of its own, driven over a Unix socket."""

from __future__ import annotations

import select
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from vllm_di.components.executor import rpc
from vllm_di.components.interfaces import Placement, Worker, WorkerLauncher
from vllm_di.components.messages import HiddenStates, StepPlan, StepResult, WorkerReport
from vllm_di.components.transport import Codec, Connection, Failure, Rendezvous
from vllm_di.errors import EngineDeadError

CLOSE_SECONDS = 5.0
CODEC: Codec[rpc.Answer] = Codec(rpc.Answer)


class WorkerProcess(Worker):
    """A worker elsewhere: spawned by the constructor, ready after ``connect``.

    ``name`` is what errors call it: ``worker 1``, ``stage 0``.
    """

    def __init__(
        self,
        launcher: WorkerLauncher,
        placement: Placement,
        name: str,
        *,
        start_timeout: float,
        step_timeout: float,
    ) -> None:
        self.name, self._start_timeout, self._step_timeout = name, start_timeout, step_timeout
        self._connection: Connection[rpc.Answer] | None = None
        self._rendezvous = Rendezvous()
        try:
            command, assembly = launcher.command(placement, self._rendezvous.address)
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        except BaseException:
            self._rendezvous.close()
            raise
        assert self._process.stdin is not None
        self._process.stdin.write(assembly)
        self._process.stdin.close()

    def load(self) -> WorkerReport:
        report: WorkerReport = self.call(rpc.Load(), self._start_timeout)
        return report

    def allocate(self, num_blocks: int) -> None:
        self.call(rpc.Allocate(num_blocks), self._start_timeout)

    def execute(self, plan: StepPlan, hidden: HiddenStates | None = None) -> StepResult:
        result: StepResult = self.call(rpc.Execute(plan, hidden), self._step_timeout)
        return result

    def close(self) -> None:
        self.hang_up()
        self.reap()

    # -- starting -----------------------------------------------------------------------------

    @property
    def socket(self) -> socket.socket:
        """Readable when there is something to ``greet``."""
        return self._connection.socket if self._connection else self._rendezvous.socket

    def greet(self) -> bool:
        """Take its call, then its hello: True after that. Raises what it says went wrong."""
        if self._connection is None:
            sock, _ = self._rendezvous.socket.accept()
            self._rendezvous.close()
            self._connection = Connection(sock, CODEC)
            return False
        value(self.answer(self._start_timeout))
        return True

    # -- talking ------------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """A command as ``CODEC.frame`` made it. Raises EngineDeadError."""
        assert self._connection is not None
        try:
            self._connection.send_frame(frame)
        except OSError as error:
            raise self._lost(str(error)) from None

    def answer(self, timeout: float) -> rpc.Answer:
        """The answer to the oldest command. Raises EngineDeadError when none comes in time."""
        assert self._connection is not None
        self._connection.socket.settimeout(timeout)
        try:
            return self._connection.receive()
        except TimeoutError:
            raise EngineDeadError(f"{self.name} gave no answer for {timeout:.0f} s") from None
        except (EngineDeadError, OSError) as error:
            raise self._lost(str(error)) from None

    def call(self, command: rpc.Command, timeout: float) -> Any:
        """One command and the value of its answer; raises the worker's own failure."""
        self.send(CODEC.frame(command))
        return value(self.answer(timeout))

    def check_alive(self) -> None:
        """Raises EngineDeadError when it is gone."""
        if self._process.poll() is not None:
            raise EngineDeadError(f"{self.name} {self._ending()}")

    def hang_up(self) -> None:
        """Ask it to close; ``reap`` waits for its end."""
        self._rendezvous.close()
        if self._connection is None:
            return
        try:
            self._connection.send(rpc.Close())
        except OSError:
            pass  # it is gone already
        finally:
            self._connection.close()

    def reap(self) -> None:
        """Wait for its end; help where it takes too long."""
        for signal in (None, self._process.terminate, self._process.kill):
            if signal is not None:
                signal()
            try:
                self._process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            return

    def _lost(self, why: str) -> EngineDeadError:
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            return EngineDeadError(f"{self.name}: {why}")
        return EngineDeadError(f"{self.name} {self._ending()}")

    def _ending(self) -> str:
        code = self._process.returncode
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"


def connect(workers: Sequence[WorkerProcess], timeout: float) -> None:
    """Wait until all are ready. They may wait for each other: one that fails is told of at once."""
    waiting = {worker.socket: worker for worker in workers}
    end = time.monotonic() + timeout
    while waiting:
        readable = select.select(list(waiting), [], [], 0.2)[0]
        for sock in readable:
            worker = waiting.pop(sock)
            if not worker.greet():
                waiting[worker.socket] = worker
        if not readable:
            for worker in workers:
                worker.check_alive()
        if waiting and time.monotonic() > end:
            late = next(iter(waiting.values()))
            raise EngineDeadError(f"{late.name} did not start within {timeout:.0f} s")


def value(answer: rpc.Answer) -> Any:
    """What an answer carries. Raises the failure that it tells of."""
    if isinstance(answer, Failure):
        raise answer.error()
    if isinstance(answer, rpc.Report):
        return answer.report
    if isinstance(answer, rpc.Result):
        return answer.result
    return answer.value if isinstance(answer, rpc.Done) else None
