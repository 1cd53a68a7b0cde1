"""Bytes through memory that two workers on one host both map."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from vllm_di.components.interfaces import KvTransfer
from vllm_di.errors import ConfigError, EngineDeadError, PortError

KEPT = 4
"""Pieces of memory kept for the next offers: fresh pages cost as much as the copy into them."""


class SharedMemoryTransfer(KvTransfer):
    """Each offer is an anonymous file in memory (memfd), which another process of the same user
    opens under /proc: it has no name in /dev/shm, and it ends with the processes that hold it,
    however they end."""

    def __init__(self) -> None:
        self._offers: dict[str, _Piece] = {}
        self._idle: list[_Piece] = []

    def check_hosts(self, addresses: Sequence[str]) -> None:
        if len({*addresses}) > 1:
            raise ConfigError(
                f"kv_transfer=shared_memory: the workers are on {', '.join(sorted({*addresses}))}, "
                "which share no memory; take kv_transfer=tcp, or executor.strategy=STRICT_PACK"
            )

    def open(self, session: bytes) -> None:
        """Nothing to agree on: the kernel lets only the same user open the memory."""

    def offer(self, size: int) -> tuple[str, memoryview]:
        fitting = [piece for piece in self._idle if piece.size >= size]
        if fitting:
            piece = min(fitting, key=lambda p: p.size)
            self._idle.remove(piece)
        else:
            piece = _Piece(max(mmap.PAGESIZE, 1 << (size - 1).bit_length()))
        ticket = f"{os.getpid()} {piece.file} {size}"
        self._offers[ticket] = piece
        return ticket, memoryview(piece.memory)[:size]

    @contextmanager
    def take(self, ticket: str) -> Iterator[memoryview]:
        process, file, size = _read(ticket)
        try:
            opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise EngineDeadError(f"the cache that process {process} offered: {error}") from None
        try:
            memory = mmap.mmap(opened, size)
        finally:
            os.close(opened)
        view = memoryview(memory)
        try:
            yield view
        finally:
            with suppress(BufferError):  # an error holds a view of it: unmapped with that one
                view.release()
                memory.close()

    def withdraw(self, ticket: str) -> None:
        piece = self._offers.pop(ticket, None)
        if piece is None:
            return
        self._idle.append(piece)
        if len(self._idle) > KEPT:
            self._idle.pop(0).close()

    def close(self) -> None:
        for piece in [*self._offers.values(), *self._idle]:
            piece.close()
        self._offers.clear()
        self._idle.clear()


class _Piece:
    """A file in memory, mapped."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.file = os.memfd_create("vllm-di-kv", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.file, size)
            self.memory = mmap.mmap(self.file, size)
        except BaseException:
            os.close(self.file)
            raise

    def close(self) -> None:
        with suppress(BufferError):  # a view of it is alive: unmapped with the view
            self.memory.close()
        os.close(self.file)


def _read(ticket: str) -> tuple[int, int, int]:
    parts = ticket.split(" ")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise PortError(f"{ticket!r} is no ticket of kv_transfer=shared_memory")
    process, file, size = map(int, parts)
    return process, file, size
