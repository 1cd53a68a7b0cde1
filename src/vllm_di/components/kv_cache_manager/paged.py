"""Blocks of the KV cache: who holds them, which are shared, which may be taken."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_di.components.interfaces import KvCacheManager, Prefix
from vllm_di.components.messages import WorkerReport


@dataclass(slots=True)
class _Table:
    """One live sequence's blocks."""

    prefix: Prefix | None
    """None where no prefix was looked up: its salt is unknown, so it is not shared."""
    blocks: list[int] = field(default_factory=list)
    num_committed: int = 0
    """Leading blocks that are full and known by their key."""


@dataclass(slots=True)
class _Found:
    """What is known of one request's tokens: ``Prefix.keys``."""

    keys: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were made."""
    blocks: list[int] = field(default_factory=list)
    """The last look-up's."""
    num_idle: int = 0
    """Of these, those that no live sequence holds."""
    version: int = -1
    """When that look-up was made."""


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
        self._version = 0  # raised when a look-up could find something else than before

    @property
    def num_usable_blocks(self) -> int:
        """All blocks but the null block."""
        return self._num_usable

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def match_prefix(self, seq_id: int, token_ids: Sequence[int], salt: str | None) -> int:
        prefix = Prefix(token_ids, salt)
        self._start(seq_id, prefix, self._find(prefix).blocks)
        return len(self._tables[seq_id].blocks) * self.block_size

    def admit(
        self, seq_id: int, prefix: Prefix, take: Callable[[int], int]
    ) -> tuple[int, int] | None:
        found = self._find(prefix)
        cached = len(found.blocks) * self.block_size
        count = take(cached)
        missing = -(-(cached + count) // self.block_size) - len(found.blocks)
        # idle blocks count as free until this sequence holds them
        if count <= 0 or missing + found.num_idle > len(self._free):
            return None
        self._start(seq_id, prefix, found.blocks)
        self.allocate(seq_id, cached + count)
        return cached, count

    def _find(self, prefix: Prefix) -> _Found:
        """The cached blocks that the tokens begin with. A key is made once; those that were made
        are looked up without a loop in Python, and only when something has changed."""
        if not self._caching or not prefix.lookup:
            return _Found()
        found = self._found(prefix)
        if found.version == self._version:
            return found
        full = (len(prefix.token_ids) - 1) // self.block_size  # the last token must run
        blocks = list(map(self._block_of.get, found.keys[:full]))
        while None not in blocks and len(blocks) < full:
            blocks.append(self._block_of.get(self._key_at(prefix, len(blocks))))
        count = blocks.index(None) if None in blocks else len(blocks)
        found.blocks = [block for block in blocks[:count] if block is not None]
        found.num_idle = sum(map(self._free.__contains__, found.blocks))
        found.version = self._version
        return found

    def _start(self, seq_id: int, prefix: Prefix, blocks: list[int]) -> None:
        """A table of found blocks, and the statistics of a request's first admission."""
        self._version += 1
        for block in blocks:
            self._hold(block)
        self._tables[seq_id] = _Table(prefix, list(blocks), len(blocks))
        if self._caching and prefix.lookup and not prefix.admitted:
            self._queries += len(prefix.token_ids)
            self._hits += len(blocks) * self.block_size
        prefix.admitted = True

    def allocate(self, seq_id: int, num_tokens: int) -> list[int] | None:
        table = self._tables.get(seq_id)
        held = len(table.blocks) if table else 0
        missing = -(-num_tokens // self.block_size) - held
        if missing <= 0:
            return []
        if missing > len(self._free):
            return None
        if table is None:
            table = self._tables[seq_id] = _Table(None)
        self._version += 1
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
        if table is None or table.prefix is None or not self._caching:
            return
        table.prefix.token_ids = token_ids
        while (table.num_committed + 1) * self.block_size <= num_computed:
            key = self._key_at(table.prefix, table.num_committed)
            block = table.blocks[table.num_committed]
            # an equal block may be known already: then this copy stays anonymous
            if key not in self._block_of and block not in self._hash_of:
                self._version += 1
                self._block_of[key] = block
                self._hash_of[block] = key
            table.num_committed += 1

    def _found(self, prefix: Prefix) -> _Found:
        if prefix.keys is None:
            prefix.keys = _Found()
        found: _Found = prefix.keys
        return found

    def _key_at(self, prefix: Prefix, index: int) -> bytes:
        """Of full block ``index``; those before it are made too."""
        keys, size = self._found(prefix).keys, self.block_size
        while len(keys) <= index:
            start = len(keys) * size
            parent = keys[-1] if keys else _root(prefix.salt)
            keys.append(_hash(parent, prefix.token_ids[start : start + size]))
        return keys[index]

    def free(self, seq_id: int) -> None:
        table = self._tables.pop(seq_id, None)
        if table is None:
            return
        self._version += 1
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
        self._version += 1
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


def _root(salt: str | None) -> bytes:
    """Stands before the first block."""
    return hashlib.sha256(b"" if salt is None else b"salt" + salt.encode()).digest()


def _hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Of a block and, by its parent, of all before it."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()
