"""For whoever moves the KV cache between workers: the way that its bytes take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

from vllm_di.errors import ConfigError


class KvTransfer(ABC):
    """Carries bytes of the KV cache from the worker that offers them to one that takes them.

    One choice for all workers of an engine: each builds its own, and the executor one more, for
    ``check``. Constructors open nothing. Calls of one object come from one thread at a time.
    """

    def check(self) -> None:
        """Asked by an executor that moves cache, before any worker starts. Raises ConfigError where
        this component cannot."""
        return

    def check_hosts(self, addresses: Sequence[str]) -> None:
        """Asked once a cluster has placed all workers of an engine, before they start: on hosts
        with these IP addresses, one for each worker. Raises ConfigError where the cache cannot
        cross between them."""
        if len({*addresses}) > 1:
            raise ConfigError(f"{type(self).__name__} does not say that it reaches other hosts")

    def settle(self, address: str) -> None:
        """Called before ``open`` in a worker that a cluster has placed. ``address``: of its host,
        as other workers reach it."""
        return

    @abstractmethod
    def open(self, session: bytes) -> None:
        """Called once in each worker, before anything else. ``session``: 32 random bytes that the
        workers of this engine know, and nobody else."""

    @abstractmethod
    def offer(self, size: int) -> tuple[str, memoryview]:
        """-> (ticket, memory of ``size`` bytes): fill the memory, then hand the ticket out. Several
        may take it; the memory stays until ``withdraw``."""

    @abstractmethod
    def take(self, ticket: str) -> AbstractContextManager[memoryview]:
        """In another worker: the bytes behind a ticket, good within the ``with`` block. Raises
        EngineDeadError where its worker is gone, PortError for a ticket of another kind."""

    @abstractmethod
    def withdraw(self, ticket: str) -> None:
        """The offer's memory may be used again; unknown tickets are ignored."""

    def close(self) -> None: ...
