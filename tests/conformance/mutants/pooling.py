"""Poolers with a flaw."""

from __future__ import annotations

from torch import Tensor

from vllm_di.components.interfaces import SequenceState
from vllm_di.components.pooler.rows import LastPooler, MeanPooler


class LastButOne(LastPooler):
    """Takes the token before the last one, where there is one."""

    def wanted(self, start: int, count: int, prompt_len: int) -> range:
        at = max(prompt_len - 2, 0)
        return range(max(start, at), min(start + count, at + 1))


class PadInTheMean(MeanPooler):
    """Counts one padding row of each step: padding rows repeat row 0."""

    def take(self, rows: Tensor, state: SequenceState) -> None:
        super().take(rows, state)
        super().take(rows[:1], state)


class LastChunkAlone(MeanPooler):
    """Forgets the chunks before the last one."""

    def take(self, rows: Tensor, state: SequenceState) -> None:
        state.pooler_state = None
        super().take(rows, state)


class MeanOfTheUncached(MeanPooler):
    """Reads what ran, and lets the prefix cache leave the rest out."""

    every_token = False
