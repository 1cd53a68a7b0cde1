"""A cross-encoder's score of a pair of texts: what its head makes of the first token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vllm_di.components.interfaces import Pooler, SequenceState
from vllm_di.components.messages import Pooling


class ScorePooler(Pooler):
    """The number of the first token's row, through the activation that the model was trained
    with."""

    every_token = True

    def __init__(self, *, activation: Literal["sigmoid", "identity"]) -> None:
        self._is_sigmoid = activation == "sigmoid"

    def report(self, size: int) -> Pooling:
        return Pooling(kind="score", size=size, normalized=False, every_token=True)

    def wanted(self, start: int, count: int, prompt_len: int) -> range:
        return range(start, min(start + count, 1))

    def take(self, rows: Tensor, state: SequenceState) -> None:
        if len(rows):
            state.pooler_state = rows[0].clone()

    def finish(self, state: SequenceState) -> Tensor:
        score: Tensor = state.pooler_state
        return torch.sigmoid(score) if self._is_sigmoid else score
