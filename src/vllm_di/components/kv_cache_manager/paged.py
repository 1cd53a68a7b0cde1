"""Blocks of the KV cache: who holds them, which are shared, which may be taken."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_di.components.interfaces import KvCacheManager
from vllm_di.components.messages import WorkerReport


@dataclass(slots=True)
class _Table:
    """One live sequence's blocks."""

    blocks: list[int] = field(default_factory=list)
    num_committed: int = 0
    """Leading blocks that are full and known by their hash."""
    last_hash: bytes = b""
    """Hash of the last of these; at first, of the salt."""


class PagedKvCacheManager(KvCacheManager):
    """Reference-counted blocks with automatic prefix caching.

    A full block is known by the SHA-256 of its tokens and of all before it, so two prompts never
    meet by accident. A block that nobody holds keeps its content until it is needed; the one unused
    for longest goes first.
    """

    def __init__(self, worker_report: WorkerReport, *, prefix_caching: bool) -> None:
        self.num_blocks, self.block_size = worker_report.num_blocks, worker_report.block_size
        self._caching = prefix_caching
        first = 1 if worker_report.limits.null_block else 0
        # all blocks that no live sequence holds, the next to be taken first
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(first, self.num_blocks))
        self._num_usable = len(self._free)
        self._users = [0] * self.num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._tables: dict[int, _Table] = {}
        self._queries = self._hits = 0

    @property
    def num_usable_blocks(self) -> int:
        """All blocks but the null block."""
        return self._num_usable

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def match_prefix(self, seq_id: int, token_ids: Sequence[int], salt: str | None) -> int:
        table = self._tables[seq_id] = _Table(last_hash=_hash(b"", (), salt))
        if not self._caching:
            return 0
        size = self.block_size
        full = (len(token_ids) - 1) // size  # the last token must run
        for index in range(full):
            key = _hash(table.last_hash, token_ids[index * size : (index + 1) * size])
            block = self._block_of.get(key)
            if block is None:
                break
            self._hold(block)
            table.blocks.append(block)
            table.last_hash = key
        table.num_committed = len(table.blocks)
        self._queries += len(token_ids)
        self._hits += len(table.blocks) * size
        return len(table.blocks) * size

    def allocate(self, seq_id: int, num_tokens: int) -> list[int] | None:
        table = self._tables.setdefault(seq_id, _Table())
        missing = -(-num_tokens // self.block_size) - len(table.blocks)
        if missing <= 0:
            return []
        if missing > len(self._free):
            return None
        new = []
        for _ in range(missing):
            block, _nothing = self._free.popitem(last=False)
            self._forget(block)
            self._users[block] = 1
            new.append(block)
        table.blocks += new
        return new

    def commit(self, seq_id: int, token_ids: Sequence[int], num_computed: int) -> None:
        table = self._tables.get(seq_id)
        if table is None or not self._caching:
            return
        size = self.block_size
        while (table.num_committed + 1) * size <= num_computed:
            start = table.num_committed * size
            table.last_hash = _hash(table.last_hash, token_ids[start : start + size])
            block = table.blocks[table.num_committed]
            # an equal block may be known already: then this copy stays anonymous
            if table.last_hash not in self._block_of and block not in self._hash_of:
                self._block_of[table.last_hash] = block
                self._hash_of[block] = table.last_hash
            table.num_committed += 1

    def free(self, seq_id: int) -> None:
        table = self._tables.pop(seq_id, None)
        if table is None:
            return
        # the last blocks first: the beginning of a prompt is what others share
        for block in reversed(table.blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def block_ids(self, seq_id: int) -> list[int]:
        table = self._tables.get(seq_id)
        return list(table.blocks) if table else []

    def reset_prefix_cache(self) -> None:
        for block in self._free:
            self._forget(block)

    def stats(self) -> tuple[int, int]:
        return self._queries, self._hits

    def _hold(self, block: int) -> None:
        if self._users[block] == 0:
            del self._free[block]
        self._users[block] += 1

    def _forget(self, block: int) -> None:
        key = self._hash_of.pop(block, None)
        if key is not None:
            del self._block_of[key]


def _hash(parent: bytes, token_ids: Sequence[int], salt: str | None = None) -> bytes:
    digest = hashlib.sha256(parent)
    digest.update(array("q", token_ids).tobytes())
    if salt is not None:
        digest.update(b"salt" + salt.encode())
    return digest.digest()
