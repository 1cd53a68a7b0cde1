"""Blocks of a KV cache that lies on several sides: which side holds what, and how a block of the
scheduler is called on a side whose own blocks are smaller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vllm_di.components.messages import KvSpan


class Held(NamedTuple):
    """The first tokens of one block."""

    group: int
    block: int
    """The scheduler's."""
    tokens: int
    generation: int
    """The block's, when this was written down: another one now means that the block has been given
    to another sequence."""


class BlockLedger:
    """How many tokens of each block every side holds, counting what is on its way in the queues."""

    def __init__(self, num_blocks: int, num_sides: int) -> None:
        self._tokens = [[0] * num_blocks for _ in range(num_sides)]
        self._generations = [0] * num_blocks

    def renew(self, block: int) -> None:
        """It is given to a sequence, empty: what any side holds of it is nothing now."""
        self._generations[block] += 1
        for tokens in self._tokens:
            tokens[block] = 0

    def tokens(self, side: int, block: int) -> int:
        return self._tokens[side][block]

    def held(self, group: int, block: int, tokens: int) -> Held:
        return Held(group, block, tokens, self._generations[block])

    def is_current(self, held: Held) -> bool:
        return self._generations[held.block] == held.generation

    def receive(self, side: int, held: Held) -> None:
        """A side gets these tokens from another one."""
        self._tokens[side][held.block] = max(self._tokens[side][held.block], held.tokens)

    def run(self, side: int, block: int, start: int, end: int) -> None:
        """A side computes the tokens [start, end) of a block. What another one holds of them, or
        behind them, is out of date: guesses that proved wrong are written over."""
        for index, tokens in enumerate(self._tokens):
            tokens[block] = end if index == side else min(tokens[block], start)


class SideBlocks:
    """The scheduler's blocks of ``size`` tokens as one side's of ``own``: block n is the blocks
    n * k to n * k + k - 1 there."""

    def __init__(self, size: int, own: int, max_model_len: int) -> None:
        self.ratio, self._size, self._own = size // own, size, own
        self._columns = -(-max_model_len // own)

    def table(self, blocks: Iterable[int], first: int = 0) -> list[int]:
        """A row of a block table, or what is added to one that holds ``first`` of this side's
        blocks, as long as a sequence can be; -1 stays -1."""
        own = [
            -1 if block < 0 else block * self.ratio + part
            for block in blocks
            for part in range(self.ratio)
        ]
        return own[: max(0, self._columns - first)]

    def spans(self, held: Sequence[Held], skipped: Iterable[Held] = ()) -> list[KvSpan]:
        """What crosses, in an order that is the same on every side: group by group, whole blocks
        together, then those that are not full. ``skipped`` are not to be written."""
        left_out = set(skipped)

        def own(one: Held) -> list[int]:
            if one in left_out:
                return [-1] * -(-one.tokens // self._own)
            first = one.block * self.ratio
            return list(range(first, first + -(-one.tokens // self._own)))

        spans = []
        for group in sorted({one.group for one in held}):
            mine = [one for one in held if one.group == group]
            whole = [one for one in mine if one.tokens == self._size]
            if whole:
                blocks = [block for one in whole for block in own(one)]
                spans.append(KvSpan(group, blocks, len(whole) * self._size))
            partial = [one for one in mine if one.tokens < self._size]
            spans += [KvSpan(group, own(one), one.tokens) for one in partial]
        return spans
