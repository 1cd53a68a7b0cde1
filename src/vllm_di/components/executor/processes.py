"""One worker in a process of its own, driven over a Unix socket."""

from __future__ import annotations

import logging
import select
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_di.components.executor.rpc import GREETING, Call, Close, Hello, result
from vllm_di.components.heartbeat import Listener, Silence, put_down
from vllm_di.components.interfaces import DEFAULT_ROLE, Placement, WorkerLauncher
from vllm_di.components.messages import Peer
from vllm_di.components.transport import Codec, Connection, Failure, Rendezvous
from vllm_di.errors import EngineDeadError

CLOSE_SECONDS = 5.0
GRACE_SECONDS = 5.0
"""Beyond a step's timeout, for the error to arrive that names the process that is hung."""
GREETING_SECONDS = 5.0
"""For the rest of a hello whose first byte is there."""
BLAME_SECONDS = 1.0
"""For the end of a process to show, when another has failed because of it."""

log = logging.getLogger(__name__)


class WorkerProcess:
    """A worker in another process: spawned by the constructor, ready after ``connect``.

    ``name`` is what errors call it: ``worker 1``, ``stage 0``. ``listener`` hears its heartbeat.
    """

    def __init__(
        self,
        launcher: WorkerLauncher,
        placement: Placement,
        name: str,
        *,
        listener: Listener,
    ) -> None:
        self.name = name
        self._listener, self._silence = listener, Silence()
        self._connection: Connection[Hello | Failure] | None = None
        self._has_heart = False
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

    def close(self) -> None:
        self.hang_up()
        self.reap()

    # -- starting -----------------------------------------------------------------------------

    @property
    def socket(self) -> socket.socket:
        """Readable when there is something to ``greet``, or to ``receive``."""
        return self._connection.socket if self._connection else self._rendezvous.socket

    def greet(self) -> bool:
        """Accept its two connections, then take its hello: True after that. Raises what it says
        went wrong."""
        if self._connection is None:
            sock, _ = self._rendezvous.socket.accept()
            if not self._has_heart:  # the first connection of the two
                self._has_heart = True
                self._silence = self._listener.watch(sock)
                return False
            self._rendezvous.close()
            self._connection = Connection(sock, GREETING)
            return False
        greeting = self.answer(GREETING, GREETING_SECONDS)
        if isinstance(greeting, Failure):
            raise greeting.error()
        return True

    # -- talking ------------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """A call's frame. Raises EngineDeadError."""
        assert self._connection is not None
        try:
            self._connection.send_frame(frame)
        except OSError as error:
            raise self._lost(str(error)) from None

    def answer(self, call: Call | Codec[Any], timeout: float) -> Any:
        """The answer to the oldest call, which was this one. When none comes in time, the process
        is killed. Raises EngineDeadError."""
        assert self._connection is not None
        self._connection.socket.settimeout(timeout)
        try:
            payload = self._connection.receive_payload()
        except TimeoutError:
            raise hung([self], timeout) from None
        except (EngineDeadError, OSError) as error:
            raise self._lost(str(error)) from None
        return call.decode(payload)

    def call(self, call: Call, frame: bytes, timeout: float) -> Any:
        """Send a call's frame and wait for its result; raises the worker's own failure."""
        self.send(frame)
        return result(self.answer(call, timeout))

    def check_alive(self) -> None:
        """Raises EngineDeadError when it is gone."""
        if self._process.poll() is not None:
            raise EngineDeadError(f"{self.name} {self._ending()}")

    def peer(self) -> Peer:
        """What a heartbeat says of it."""
        return Peer(self.name, self._process.pid, self._silence.is_long)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def hang_up(self) -> None:
        """Ask it to close; ``reap`` waits for its end."""
        self._rendezvous.close()
        if self._connection is None:
            return
        try:
            self._connection.send(Close())
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


def called(launcher: WorkerLauncher, name: str) -> str:
    """A worker's name for errors, with its role: ``decode stage 1``."""
    return name if launcher.role == DEFAULT_ROLE else f"{launcher.role} {name}"


def connect(workers: Sequence[WorkerProcess], timeout: float) -> None:
    """Wait until all are ready. They may wait for each other, so a failure is raised at once."""
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


def answers(workers: Sequence[WorkerProcess], call: Call, timeout: float) -> list[Any]:
    """The answers of all to the same call, in their order.

    Raises EngineDeadError as soon as one is gone, and names that one: the others may fail only
    because they wait for it. Raises the failure that one reports. Those that have not answered in
    time are killed.
    """
    found: dict[str, Any] = {}
    waiting = {worker.socket: worker for worker in workers}
    end = time.monotonic() + timeout
    failed: Failure | None = None
    while waiting:
        left = end - time.monotonic()
        if left <= 0 and failed is None:
            raise hung(list(waiting.values()), timeout)
        for sock in select.select(list(waiting), [], [], max(0.0, left))[0]:
            worker = waiting.pop(sock)
            found[worker.name] = answer = worker.answer(call, max(left, 1.0))
            if isinstance(answer, Failure) and failed is None:
                failed = answer
                end = min(end, time.monotonic() + BLAME_SECONDS)
        if failed is not None and time.monotonic() >= end:
            if silent := [worker for worker in waiting.values() if worker.peer().silent]:
                raise hung(silent, timeout)
            break
    if failed is not None:
        raise failed.error()
    return [found[worker.name] for worker in workers]


def hung(workers: Sequence[WorkerProcess], seconds: float) -> EngineDeadError:
    """Kill processes that gave no answer. The error names those without a heartbeat, or else all of
    them: in a collective every rank waits for the slowest."""
    silent = [worker for worker in workers if worker.peer().silent]
    names = ", ".join(worker.name for worker in silent or workers)
    why = " nor a sign of life" if silent else ""
    log.error("%s gave no answer for %g s: stacks follow where it can still tell", names, seconds)
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(lambda worker: put_down(worker.signal), workers))
    return EngineDeadError(f"{names} gave no answer{why} for {seconds:g} s: killed")
