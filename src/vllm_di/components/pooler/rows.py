"""One vector of a prompt: its first row, its last, or the mean of all."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import Pooler, SequenceState
from vllm_di.components.messages import Pooling
from vllm_di.errors import ConfigError

SHORTEST = 1e-12
"""A vector is divided by its length, or by this: torch's ``normalize`` does so, and
sentence-transformers by it."""
Size = Annotated[int, msgspec.Meta(ge=1)]


class RowPooler(Pooler):
    """What the poolers have in common: the length of the result, and what it may be cut to."""

    def __init__(self, *, normalize: bool, dimensions: list[Size] | None) -> None:
        """``dimensions``: sizes that a request may ask for; [] for any, None for none."""
        self._normalize, self._dimensions = normalize, dimensions

    def report(self, size: int) -> Pooling:
        if too_large := [n for n in self._dimensions or () if n > size]:
            raise ConfigError(
                f"pooler.dimensions has {too_large[0]}, but a vector of this model has {size} "
                "numbers"
            )
        return Pooling(
            size=size,
            normalized=self._normalize,
            dimensions=self._dimensions,
            every_token=self.every_token,
        )

    def _finished(self, vector: Tensor) -> Tensor:
        return vector / vector.norm().clamp(min=SHORTEST) if self._normalize else vector


class _OneRow(RowPooler):
    """A row at one position."""

    def take(self, rows: Tensor, state: SequenceState) -> None:
        if len(rows):
            state.pooler_state = rows[0].clone()

    def finish(self, state: SequenceState) -> Tensor:
        vector: Tensor = state.pooler_state
        return self._finished(vector)


class LastPooler(_OneRow):
    """The last token's: in a decoder it alone has seen the whole text."""

    def wanted(self, start: int, count: int, prompt_len: int) -> range:
        return range(max(start, prompt_len - 1), start + count)


class ClsPooler(_OneRow):
    """The first token's, [CLS] in encoders."""

    every_token = True

    def wanted(self, start: int, count: int, prompt_len: int) -> range:
        return range(start, min(start + count, 1))


class MeanPooler(RowPooler):
    """The mean of all tokens, special ones too. Chunks are summed in fp32."""

    every_token = True

    def wanted(self, start: int, count: int, prompt_len: int) -> range:
        return range(start, start + count)

    def take(self, rows: Tensor, state: SequenceState) -> None:
        total, number = state.pooler_state or (0.0, 0)
        state.pooler_state = (total + rows.sum(0, dtype=torch.float32), number + len(rows))

    def finish(self, state: SequenceState) -> Tensor:
        total, number = state.pooler_state
        return self._finished(total / number)
