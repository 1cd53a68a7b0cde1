"""For engines whose workers are all of one role."""

from __future__ import annotations

from contextlib import AbstractContextManager

from vllm_di.components.interfaces import KvTransfer
from vllm_di.errors import ConfigError


class NoKvTransfer(KvTransfer):
    """Moves nothing, and says so when it is asked to."""

    def __init__(self) -> None: ...

    def check(self) -> None:
        raise ConfigError(
            "kv_transfer=none moves no cache, and this executor hands it over between workers; "
            "take kv_transfer=shared_memory or kv_transfer=tcp"
        )

    def open(self, session: bytes) -> None:
        self.check()

    def offer(self, size: int) -> tuple[str, memoryview]:
        raise NotImplementedError("kv_transfer=none moves no cache")

    def take(self, ticket: str) -> AbstractContextManager[memoryview]:
        raise NotImplementedError("kv_transfer=none moves no cache")

    def withdraw(self, ticket: str) -> None:
        raise NotImplementedError("kv_transfer=none moves no cache")
