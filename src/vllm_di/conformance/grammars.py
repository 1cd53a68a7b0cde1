"""A grammar whose masks are known beforehand: lists of tokens, one for each place of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_di.components.interfaces import MaskTask, StructuredOutput
from vllm_di.components.messages import SamplingParams


class Listed(StructuredOutput):
    """``{"listed": [[1, 2], [3]]}``: one of the tokens 1 and 2, then 3, then the end."""

    def __init__(self) -> None:
        self.began: list[int] = []
        """Tokens that each sequence had when its first mask was asked for."""

    def check(self, params: SamplingParams) -> None:
        return

    def start(
        self, params: SamplingParams, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> dict[str, Any]:
        assert params.structured_output is not None
        return {"listed": params.structured_output["listed"], "at": 0, "ends": eos_token_ids}

    def fill(self, tasks: Sequence[MaskTask]) -> None:
        for task in tasks:
            task.place["at"] += len(task.tokens)
            for row, mask in enumerate(task.masks):
                at = task.place["at"] + row
                listed = task.place["listed"]
                for token in listed[at] if at < len(listed) else task.place["ends"]:
                    mask[token // 32] |= np.uint32(1 << token % 32)
