"""What a request may do to its logits before a token is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_di.components.messages import SamplingParams


class Adjustments:
    """Masks, biases and penalties of one sequence. Counts are brought up to date as tokens come."""

    @classmethod
    def of(
        cls, params: SamplingParams, ends: list[int], bad_words: list[list[int]]
    ) -> Adjustments | None:
        """None for a request that leaves its logits alone."""
        wanted = (
            params.logit_bias
            or params.allowed_token_ids is not None
            or bad_words
            or params.min_tokens
            or params.presence_penalty
            or params.frequency_penalty
            or params.repetition_penalty != 1.0
        )
        return cls(params, ends, bad_words) if wanted else None

    def __init__(self, params: SamplingParams, ends: list[int], bad_words: list[list[int]]) -> None:
        self._params, self._bad_words = params, bad_words
        self._ends = torch.tensor(sorted(set(ends)), dtype=torch.int64)
        self._repeats = params.repetition_penalty != 1.0
        self._counts_output = bool(params.presence_penalty or params.frequency_penalty)
        self._seen: Tensor | None = None  # [vocab] bool: prompt and output
        self._counts: Tensor | None = None  # [vocab] fp32: output alone
        self._num_counted = 0

    def apply(self, logits: Tensor, token_ids: Sequence[int], prompt_len: int) -> None:
        """logits [vocab] fp32, changed in place. Order and meaning are vLLM's."""
        params = self._params
        if params.allowed_token_ids is not None:
            mask = torch.ones_like(logits, dtype=torch.bool)
            mask[params.allowed_token_ids] = False
            logits.masked_fill_(mask, float("-inf"))
        for words in self._bad_words:
            before = words[:-1]
            if not before or list(token_ids[-len(before) :]) == before:
                logits[words[-1]] = float("-inf")
        if len(token_ids) - prompt_len < params.min_tokens:
            logits[self._ends] = float("-inf")
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            values = torch.tensor(list(params.logit_bias.values()), device=logits.device)
            logits[ids] += values
        if self._repeats or self._counts_output:
            self._count(logits, token_ids, prompt_len)
            self._penalise(logits)

    def _count(self, logits: Tensor, token_ids: Sequence[int], prompt_len: int) -> None:
        if self._seen is None or self._counts is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            self._counts = torch.zeros_like(logits)
            self._num_counted = 0
        new = torch.tensor(token_ids[self._num_counted :], dtype=torch.int64, device=logits.device)
        self._seen[new] = True
        output = new[max(0, prompt_len - self._num_counted) :]
        self._counts.index_add_(0, output, torch.ones_like(output, dtype=self._counts.dtype))
        self._num_counted = len(token_ids)

    def _penalise(self, logits: Tensor) -> None:
        assert self._seen is not None
        assert self._counts is not None
        params = self._params
        if self._repeats:
            factor = params.repetition_penalty
            scaled = torch.where(logits > 0, logits / factor, logits * factor)
            torch.where(self._seen, scaled, logits, out=logits)
        if self._counts_output:
            logits -= params.frequency_penalty * self._counts
            logits -= params.presence_penalty * (self._counts > 0)
