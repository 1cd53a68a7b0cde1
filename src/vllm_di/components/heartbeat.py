"""Signs of life between processes.

A process that was started by another *beats*: a thread of its own sends a ``Beat`` over a second
connection to the Unix socket that the process was given. So a long step, a load or a compilation
beats on, and a process that is stopped or hung as a whole does not. How long a step has run stands
in the beat.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_di.components.messages import Peer
from vllm_di.components.transport import Codec, Connection, connect
from vllm_di.errors import EngineDeadError

INTERVAL = 0.5
"""Seconds between beats."""
SILENCE = 2.5
"""Seconds without a beat after which a process counts as silent."""
ORPHAN_SECONDS = 10.0
"""For a process whose parent is gone to close by itself."""
STACKS = signal.SIGUSR1
"""On this signal a process writes the stacks of its threads to standard error."""
STACK_SECONDS = 0.5


class Beat(msgspec.Struct, frozen=True):
    busy: float = 0.0
    """Seconds that the step has run which runs now."""
    peers: list[Peer] = []


CODEC: Codec[Beat] = Codec(Beat)


class Heart:
    """Beats to the process that listens at ``address``, from the constructor on.

    ``state`` makes each beat, in the thread. When the listener is gone, this process gets
    ``ORPHAN_SECONDS`` to end; then the thread ends it.
    """

    def __init__(self, address: str | socket.socket) -> None:
        """``address``: of a Unix socket, or a connection that is there already."""
        self.state: Callable[[], Beat] = Beat
        with contextlib.suppress(AttributeError, ValueError, OSError):  # no standard error
            faulthandler.register(STACKS, all_threads=True)
        sock = connect(address) if isinstance(address, str) else address
        self._connection: Connection[Any] = Connection(sock, CODEC)
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._connection.send(self.state())
                if select.select([self._connection.socket], [], [], INTERVAL)[0]:
                    break  # nothing is ever sent to us: the listener has closed
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)


class Silence:
    """How long a process has been silent. Time counts only while the listener itself runs, so that
    one that was stopped, with all its children, finds nobody silent.

    After ``limit`` seconds, or as soon as its connection is closed, a process with a limit counts
    as gone: ``is_over`` stays, and ``on_over`` is called once."""

    def __init__(
        self, limit: float | None = None, on_over: Callable[[], None] = lambda: None
    ) -> None:
        self.seconds = 0.0
        self.limit, self._on_over = limit, on_over
        self.is_over = self.is_closed = False
        self._last = time.monotonic()

    @property
    def is_long(self) -> bool:
        return self.seconds > SILENCE

    def tick(self) -> None:
        """To be called every ``INTERVAL``."""
        now = time.monotonic()
        self.seconds += min(now - self._last, 2 * INTERVAL)
        self._last = now
        if self.limit is not None and not self.is_over:
            self.is_over = self.is_closed or self.seconds > self.limit
            if self.is_over:
                self._on_over()

    def beat(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()


class Listener:
    """Hears the beats of processes, in a thread of its own, until ``close``."""

    def __init__(self) -> None:
        self._silences: dict[socket.socket, Silence] = {}
        self._hearts: dict[socket.socket, Connection[Beat]] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(
        self,
        sock: socket.socket,
        limit: float | None = None,
        on_over: Callable[[], None] = lambda: None,
    ) -> Silence:
        """Follow the beats that arrive at one end of a connection; the socket is the listener's
        from now on. ``limit`` and ``on_over``: the silence's, on the listener's thread."""
        silence = Silence(limit, on_over)
        sock.settimeout(INTERVAL)  # a beat comes whole, or never
        with self._lock:
            self._silences[sock], self._hearts[sock] = silence, Connection(sock, CODEC)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
            self._thread.start()
        return silence

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        for sock in self._hearts:
            sock.close()
        self._hearts, self._silences, self._thread = {}, {}, None

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                hearts, silences = dict(self._hearts), dict(self._silences)
            begin = time.monotonic()
            for sock in select.select(list(hearts), [], [], INTERVAL)[0]:
                try:
                    hearts[sock].receive()
                except (EngineDeadError, OSError, msgspec.MsgspecError):
                    with self._lock:  # the process is gone: silent from now on
                        del self._hearts[sock]
                    silences[sock].is_closed = True
                    sock.close()
                else:
                    silences[sock].beat()
            for silence in silences.values():
                silence.tick()
            # beats arrive all the time: at most one round in a tenth of the interval
            self._closing.wait(max(0.0, INTERVAL / 10 - (time.monotonic() - begin)))


def put_down(send: Callable[[int], object]) -> None:
    """End a hung process: its stacks go to its standard error where it still takes signals, then it
    is killed, which works on a stopped process too. ``send`` signals it."""
    with contextlib.suppress(ProcessLookupError, OSError):
        send(STACKS)
        time.sleep(STACK_SECONDS)
        send(signal.SIGKILL)
