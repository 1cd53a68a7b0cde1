"""Blocks of the KV cache: who holds them, which are shared, which may be taken."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_di.components.interfaces import KvCacheManager, Prefix
from vllm_di.components.messages import KvGroup, WorkerReport

LEFT = -1
"""In a table: a block that the window has left."""


@dataclass(slots=True)
class _Table:
    """One live sequence's blocks."""

    prefix: Prefix | None
    """None where no prefix was looked up: its salt is unknown, so it is not shared."""
    groups: list[list[int]]
    """Of each KvGroup. ``LEFT`` stands for a block that the window has left."""
    num_committed: int = 0
    """Leading blocks that are full and known by their key."""

    @property
    def num_blocks(self) -> int:
        """Of each group, those that the window has left among them."""
        return len(self.groups[0])


@dataclass(slots=True)
class _Found:
    """What is known of one request's tokens: ``Prefix.keys``."""

    groups: list[list[int]]
    """The last look-up's blocks, as in a table."""
    keys: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were made."""
    num_idle: int = 0
    """Found blocks that no live sequence holds."""
    version: int = -1
    """When that look-up was made."""


class PagedKvCacheManager(KvCacheManager):
    """Reference-counted blocks with automatic prefix caching.

    A full block is known by the SHA-256 of its tokens and of all before it, so two prompts never
    meet by accident. A block that nobody holds keeps its content until it is needed; the one unused
    for longest goes first. Each KvGroup has blocks of its own, all from one pool; a sequence gives
    those back that the group's window has left.
    """

    def __init__(self, worker_report: WorkerReport, *, prefix_caching: bool) -> None:
        self.num_blocks, self.block_size = worker_report.num_blocks, worker_report.block_size
        self._caching, self._groups = prefix_caching, worker_report.kv_groups
        self._has_windows = any(group.window is not None for group in self._groups)
        first = 1 if worker_report.limits.null_block else 0
        # all blocks that no live sequence holds, the next to be taken first
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(first, self.num_blocks))
        self._users = [0] * self.num_blocks
        self._key_of: dict[int, tuple[int, bytes]] = {}
        """Of a block that is shared: its group and its key."""
        self._block_of: list[dict[bytes, int]] = [{} for _ in self._groups]
        self._tables: dict[int, _Table] = {}
        self._queries = self._hits = 0
        self._version = 0  # raised when a look-up could find something else than before

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def admit(
        self, seq_id: int, prefix: Prefix, take: Callable[[int], int]
    ) -> tuple[int, int] | None:
        found = self._find(prefix)
        num_found = len(found.groups[0])
        cached = num_found * self.block_size
        count = take(cached)
        missing = (-(-(cached + count) // self.block_size) - num_found) * len(self._groups)
        # idle blocks count as free until this sequence holds them
        if count <= 0 or missing + found.num_idle > len(self._free):
            return None
        self._start(seq_id, prefix, found)
        self.allocate(seq_id, cached + count, cached)
        return cached, count

    def _find(self, prefix: Prefix) -> _Found:
        """The cached blocks that the tokens begin with, as far as every group has what it sees of
        them. A key is made once, and looked up only when something has changed."""
        found = self._found(prefix)
        if not self._caching or not prefix.lookup:
            return _Found(self._no_blocks())
        if found.version == self._version:
            return found
        count = (len(prefix.token_ids) - 1) // self.block_size  # the last token must run
        for group, known in zip(self._groups, self._block_of, strict=True):
            if group.window is None:
                count = self._num_leading(prefix, known, count)
        shorter = True
        while shorter:  # until all windows agree
            shorter = False
            for group, known in zip(self._groups, self._block_of, strict=True):
                if group.window is not None:
                    fewer = self._num_seen(prefix, group, known, count)
                    shorter, count = shorter or fewer < count, fewer
        keys = found.keys[:count]
        keys += [self._key_at(prefix, index) for index in range(len(keys), count)]
        found.groups = [
            [LEFT] * (first := group.first_block(count * self.block_size, self.block_size))
            + [known[key] for key in keys[first:]]
            for group, known in zip(self._groups, self._block_of, strict=True)
        ]
        held = (block for blocks in found.groups for block in blocks)
        found.num_idle = sum(map(self._free.__contains__, held))
        found.version = self._version
        return found

    def _num_leading(self, prefix: Prefix, known: dict[bytes, int], most: int) -> int:
        """Leading blocks that are known, ``most`` at most."""
        keys = self._found(prefix).keys
        hits = list(map(known.__contains__, keys[:most]))
        if False in hits:
            return hits.index(False)
        count = len(hits)
        while count < most and self._key_at(prefix, count) in known:
            count += 1
        return count

    def _num_seen(self, prefix: Prefix, group: KvGroup, known: dict[bytes, int], most: int) -> int:
        """The longest beginning, of ``most`` blocks at most, whose end within the window is
        known."""
        count = index = most
        while index > 0 and index > group.first_block(count * self.block_size, self.block_size):
            index -= 1
            if self._key_at(prefix, index) not in known:
                count = index
        return count

    def _start(self, seq_id: int, prefix: Prefix, found: _Found) -> None:
        """A table of found blocks, and the statistics of a request's first admission."""
        self._version += 1
        for block in (block for blocks in found.groups for block in blocks if block != LEFT):
            self._hold(block)
        num_found = len(found.groups[0])
        self._tables[seq_id] = _Table(prefix, [list(b) for b in found.groups], num_found)
        if self._caching and prefix.lookup and not prefix.admitted:
            self._queries += len(prefix.token_ids)
            self._hits += num_found * self.block_size
        prefix.admitted = True

    def num_missing(self, seq_id: int, num_tokens: int, num_computed: int) -> int:
        table = self._tables.get(seq_id)
        held = table.num_blocks if table else 0
        new = (-(-num_tokens // self.block_size) - held) * len(self._groups)
        if new <= len(self._free) or table is None:
            return max(0, new - len(self._free))
        freed = sum(self._users[block] == 1 for _, _, block in self._left(table, num_computed))
        return max(0, new - freed - len(self._free))

    def allocate(self, seq_id: int, num_tokens: int, num_computed: int) -> list[list[int]] | None:
        table = self._tables.get(seq_id)
        wanted = -(-num_tokens // self.block_size)
        if not self._has_windows and table is not None and wanted <= table.num_blocks:
            return self._no_blocks()  # most steps
        if self.num_missing(seq_id, num_tokens, num_computed):
            return None
        if table is None:
            table = self._tables[seq_id] = _Table(None, self._no_blocks())
        if self._has_windows:
            for blocks, index, block in self._left(table, num_computed):
                blocks[index] = LEFT
                self._release(block)
        new = []
        for blocks in table.groups:
            fresh = [self._take() for _ in range(wanted - len(blocks))]
            blocks += fresh
            new.append(fresh)
        return new

    def _left(self, table: _Table, num_computed: int) -> list[tuple[list[int], int, int]]:
        """(table, index, block) of those that no query from ``num_computed`` on can see."""
        found = []
        for group, blocks in zip(self._groups, table.groups, strict=True):
            if group.window is None:
                continue
            index = min(group.first_block(num_computed, self.block_size), len(blocks))
            while index > 0 and blocks[index - 1] != LEFT:
                index -= 1
                found.append((blocks, index, blocks[index]))
        return found

    def commit(self, seq_id: int, token_ids: Sequence[int], num_computed: int) -> None:
        table = self._tables.get(seq_id)
        if table is None or table.prefix is None or not self._caching:
            return
        table.prefix.token_ids = token_ids
        while (table.num_committed + 1) * self.block_size <= num_computed:
            key = self._key_at(table.prefix, table.num_committed)
            for group, blocks in enumerate(table.groups):
                self._share(group, key, blocks[table.num_committed])
            table.num_committed += 1

    def _share(self, group: int, key: bytes, block: int) -> None:
        """Make a block known. An equal one may be known already: then this copy stays anonymous."""
        if block == LEFT or key in self._block_of[group] or block in self._key_of:
            return
        self._version += 1
        self._block_of[group][key] = block
        self._key_of[block] = (group, key)

    def _found(self, prefix: Prefix) -> _Found:
        if prefix.keys is None:
            prefix.keys = _Found(self._no_blocks())
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
        # the last blocks first: the beginning of a prompt is what others share
        for block in (block for blocks in table.groups for block in reversed(blocks)):
            if block != LEFT:
                self._release(block)

    def block_ids(self, seq_id: int) -> list[list[int]]:
        table = self._tables.get(seq_id)
        return [list(blocks) for blocks in table.groups] if table else self._no_blocks()

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

    def _take(self) -> int:
        """A block that nobody holds, for a sequence."""
        self._version += 1
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._users[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._version += 1
        self._users[block] -= 1
        if self._users[block] == 0:
            self._free[block] = None
            if block not in self._key_of:
                self._free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        if block in self._key_of:
            group, key = self._key_of.pop(block)
            del self._block_of[group][key]

    def _no_blocks(self) -> list[list[int]]:
        return [[] for _ in self._groups]


def _root(salt: str | None) -> bytes:
    """Stands before the first block."""
    return hashlib.sha256(b"" if salt is None else b"salt" + salt.encode()).digest()


def _hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Of a block and, by its parent, of all before it."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()
