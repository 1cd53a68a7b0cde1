"""torch's key-value store, kept by the engine process: ranks on several hosts meet by it."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch._C._distributed_c10d import Store

from vllm_di.components.meeting import Add, Attendee, Get, Put


class EngineStore(Store):
    """What a process group needs to come together. ``descriptor``: of a connection to the engine's
    ``Meeting``, whose owner this becomes; ``seconds``: to wait for a key, where the caller does not
    say. Raises RuntimeError for one that does not come, as torch's own stores do."""

    def __init__(self, descriptor: int, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._meeting = Attendee(socket.socket(fileno=descriptor))

    def set(self, key: str, value: str | bytes) -> None:
        self._meeting.ask(Put(key, value.encode() if isinstance(value, str) else bytes(value)))

    def get(self, key: str) -> bytes:
        value = self._meeting.ask(Get(key, self._seconds))
        if value is None:
            raise RuntimeError(f"no rank has set {key!r} within {self._seconds:g} s")
        return value

    def add(self, key: str, value: int) -> int:
        return int(self._meeting.ask(Add(key, value)) or 0)

    def check(self, keys: list[str]) -> bool:
        return all(self._meeting.ask(Get(key, 0.0)) is not None for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        seconds = self._seconds if timeout is None else timeout.total_seconds()
        for key in keys:
            if self._meeting.ask(Get(key, seconds)) is None:
                raise RuntimeError(f"no rank has set {key!r} within {seconds:g} s")

    def close(self) -> None:
        self._meeting.close()
