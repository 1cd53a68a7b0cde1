"""Where ranks on several hosts find each other: keys and values that the engine process keeps, and
that its workers read over lines that are proven already. Nothing listens for it."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import msgspec

from vllm_di.components.transport import Codec, Connection
from vllm_di.errors import EngineDeadError

MOST_KEYS = 10_000
MOST_BYTES = 1 << 20
"""Of one value."""


class Put(msgspec.Struct, tag=True, frozen=True, array_like=True):
    key: str
    value: bytes


class Get(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The value, once it is there."""

    key: str
    seconds: float
    """To wait for it."""


class Add(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Add to a number, which begins at 0."""

    key: str
    amount: int


class Value(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """An answer; None where the key is not there in time."""

    value: bytes | None


Question = Put | Get | Add
QUESTIONS: Codec[Question] = Codec(Question)
ANSWERS: Codec[Value] = Codec(Value)


class Meeting:
    """The engine's end. Each connection has a thread, until its worker hangs up or ``close``."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._change = threading.Condition()
        self._sockets: list[socket.socket] = []
        self._is_closed = False

    def serve(self, sock: socket.socket) -> None:
        """Answer a worker, in a thread of its own. The socket is this one's from now on."""
        self._sockets.append(sock)
        threading.Thread(target=self._run, args=(sock,), name="meeting", daemon=True).start()

    def close(self) -> None:
        with self._change:
            self._is_closed = True
            self._change.notify_all()
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
            sock.close()

    def _run(self, sock: socket.socket) -> None:
        connection: Connection[Question] = Connection(sock, QUESTIONS)
        with suppress(EngineDeadError, OSError, msgspec.MsgspecError):
            while True:
                connection.send(Value(self._answer(connection.receive())))

    def _answer(self, question: Question) -> bytes | None:
        with self._change:
            if isinstance(question, Get):
                end = time.monotonic() + question.seconds
                while question.key not in self._values and not self._is_closed:
                    if not self._change.wait(max(0.0, end - time.monotonic())):
                        break
                return self._values.get(question.key)
            value = question.value if isinstance(question, Put) else b""
            if isinstance(question, Add):
                value = str(int(self._values.get(question.key, b"0")) + question.amount).encode()
            if len(value) > MOST_BYTES or len(self._values) >= MOST_KEYS:
                raise EngineDeadError(f"the ranks' keys are out of bounds: {question.key[:80]}")
            self._values[question.key] = value
            self._change.notify_all()
            return value


class Attendee:
    """A worker's end: one question at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._connection: Connection[Value] = Connection(sock, ANSWERS)
        self._lock = threading.Lock()

    def ask(self, question: Question) -> bytes | None:
        """Raises EngineDeadError when the engine is gone."""
        with self._lock:
            self._connection.send(question)
            return self._connection.receive().value

    def close(self) -> None:
        self._connection.close()
