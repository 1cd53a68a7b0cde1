"""One worker in a process of its own, driven over a socket."""

from __future__ import annotations

import dataclasses
import logging
import select
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import msgspec

from vllm_di.components.executor.rpc import GREETING, Call, Close, Hello, result
from vllm_di.components.heartbeat import Listener, Silence, put_down
from vllm_di.components.interfaces import DEFAULT_ROLE, Placement, WorkerLauncher
from vllm_di.components.messages import Peer
from vllm_di.components.transport import Codec, Connection, Failure, GroupStore, Rendezvous
from vllm_di.errors import EngineDeadError

CLOSE_SECONDS = 5.0
GRACE_SECONDS = 5.0
"""Beyond a step's timeout, for the error to arrive that names the process that is hung."""
GREETING_SECONDS = 5.0
"""For the rest of a hello whose first byte is there."""
BLAME_SECONDS = 1.0
"""For the end of a process to show, when another has failed because of it."""

Socket = socket.socket
log = logging.getLogger(__name__)


class Door(Protocol):
    """Where a worker connects to its executor."""

    socket: Socket
    """Readable when somebody knocks."""

    def accept(self) -> Socket | None:
        """The next connection; None for one that is not the worker's."""

    def close(self) -> None: ...


class Process(ABC):
    """A worker's process, as whoever started it knows it."""

    pid: int = 0
    """0 where it is none of this host's, or nobody here may signal it."""
    node: str = ""
    """The host, where that is another one or may be: for errors."""

    @abstractmethod
    def ending(self) -> str | None:
        """How it ended: ``was killed by signal 9``. None while it runs. Raises ConfigError where
        that is why."""

    @abstractmethod
    def wait(self, seconds: float) -> bool:
        """Whether it has ended by then."""

    @abstractmethod
    def signal(self, number: int) -> None: ...

    @abstractmethod
    def terminate(self) -> None: ...

    @abstractmethod
    def kill(self) -> None: ...


class LocalProcess(Process):
    """Of this host, started here."""

    def __init__(self, command: Sequence[str], assembly: bytes) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        self.pid = self._process.pid
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as pipe:  # ``ending`` says how it ended
            pipe.write(assembly)

    def ending(self) -> str | None:
        code = self._process.poll()
        if code is None:
            return None
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"

    def wait(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


class WorkerProcess:
    """A worker in another process: started by a ``WorkerHost``, ready after ``connect``.

    ``name`` is what errors call it: ``worker 1``, ``stage 0``. ``listener`` hears its heartbeat;
    after ``silence_limit`` seconds without one the worker counts as dead (None: whoever watches
    the engine decides). ``others`` take its connections between the heartbeat's and the calls'.
    """

    def __init__(
        self,
        name: str,
        process: Process,
        door: Door,
        *,
        listener: Listener,
        silence_limit: float | None = None,
        others: Sequence[Callable[[Socket], None]] = (),
    ) -> None:
        self.name = name
        self._process, self._door, self._listener = process, door, listener
        self._silence, self._silence_limit = Silence(), silence_limit
        self._connection: Connection[Hello | Failure] | None = None
        self._awaited: list[Callable[[Socket], None]] = [self._watch, *others]

    def close(self) -> None:
        self.hang_up()
        self.reap()

    # -- starting -----------------------------------------------------------------------------

    @property
    def socket(self) -> Socket:
        """Readable when there is something to ``greet``, or to ``receive``."""
        return self._connection.socket if self._connection else self._door.socket

    def greet(self) -> bool:
        """Accept its connections, then take its hello: True after that. Raises what it says went
        wrong."""
        if self._connection is None:
            if (sock := self._door.accept()) is None:
                return False
            if self._awaited:
                self._awaited.pop(0)(sock)
                return False
            self._door.close()
            self._connection = Connection(sock, GREETING)
            return False
        greeting = self.answer(GREETING, GREETING_SECONDS)
        if isinstance(greeting, Failure):
            raise greeting.error()
        return True

    def _watch(self, sock: Socket) -> None:
        self._silence = self._listener.watch(sock, self._silence_limit, self._cut_off)

    def _cut_off(self) -> None:
        """On the listener's thread: whoever waits for an answer need wait no longer."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.socket.shutdown(socket.SHUT_RDWR)

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
        found = call.decode(payload)
        if isinstance(found, Failure) and self._process.node:
            return msgspec.structs.replace(found, message=f"{self._where()}: {found.message}")
        return found

    def call(self, call: Call, frame: bytes, timeout: float) -> Any:
        """Send a call's frame and wait for its result; raises the worker's own failure."""
        self.send(frame)
        return result(self.answer(call, timeout))

    def check_alive(self) -> None:
        """Raises EngineDeadError when it is gone."""
        if (how := self._process.ending()) is not None:
            raise EngineDeadError(f"{self._where()} {how}")
        if self._silence.is_over:
            raise self._lost("its connection is closed")

    def peer(self) -> Peer:
        """What a heartbeat says of it."""
        return Peer(self.name, self._process.pid, self._silence.is_long)

    def signal(self, number: int) -> None:
        self._process.signal(number)

    def hang_up(self) -> None:
        """Ask it to close; ``reap`` waits for its end."""
        self._door.close()
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
        helps = (None, self._process.terminate, self._process.kill)
        for end in helps[-1:] if self._silence.is_over else helps:
            if end is not None:
                end()
            if self._process.wait(CLOSE_SECONDS):
                return

    def _where(self) -> str:
        return f"{self.name} (node {self._process.node})" if self._process.node else self.name

    def _lost(self, why: str) -> EngineDeadError:
        silence = self._silence
        if silence.is_over and not silence.is_closed:
            return EngineDeadError(
                f"{self._where()} gave no sign of life for {silence.limit:g} s: the worker, its "
                "node or the network is gone"
            )
        ending = self._process.ending() if self._process.wait(1) else None
        return EngineDeadError(f"{self._where()} {ending}" if ending else f"{self._where()}: {why}")


class WorkerHost(ABC):
    """Where an executor's workers run."""

    @abstractmethod
    def start(
        self,
        launcher: WorkerLauncher,
        placements: Sequence[Placement],
        names: Sequence[str],
        listener: Listener,
    ) -> Iterator[WorkerProcess]:
        """Start a worker for each placement, which are those of one group and have no rendezvous
        yet; ``connect`` waits for them. Whoever iterates closes those that it was given, and then
        this."""

    def close(self) -> None:
        """After its workers."""


HostFor = Callable[[WorkerLauncher, Sequence[str]], WorkerHost]
"""Gives the host of a group of workers: those of a launcher, by their names. An executor that
starts processes takes one by ``run_on``, before its start."""


class ThisHost(WorkerHost):
    """Processes of this host, over Unix sockets."""

    def __init__(self) -> None:
        self._store: GroupStore | None = None

    def start(
        self,
        launcher: WorkerLauncher,
        placements: Sequence[Placement],
        names: Sequence[str],
        listener: Listener,
    ) -> Iterator[WorkerProcess]:
        self._store = GroupStore()
        for placement, name in zip(placements, names, strict=True):
            if placement.world_size > 1:
                placement = dataclasses.replace(placement, rendezvous=self._store.address)
            door = Rendezvous()
            try:
                process = LocalProcess(*launcher.command(placement, door.address))
            except BaseException:
                door.close()
                raise
            yield WorkerProcess(name, process, door, listener=listener)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


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
