"""Samplers with a flaw."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from torch import Tensor

from vllm_di.components.interfaces import OpTable, SequenceState
from vllm_di.components.messages import SampledTokens, TokenLogprobs
from vllm_di.components.sampler.standard import StandardSampler

Sampled = tuple[list[SampledTokens], dict[int, str]]
RETAINED: list[Any] = []
"""What leaks."""


def _with(row: SequenceState, **changes: Any) -> SequenceState:
    """The row with other parameters."""
    return SequenceState(
        seq_id=row.seq_id,
        params=msgspec.structs.replace(row.params, **changes),
        token_ids=row.token_ids,
        prompt_len=row.prompt_len,
        block_ids=row.block_ids,
        eos_token_ids=row.eos_token_ids,
        bad_words_token_ids=row.bad_words_token_ids,
    )


class SeedsIgnored(StandardSampler):
    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        return super().sample(logits, [_with(row, seed=secrets.randbits(60)) for row in rows])


class OneSeed(StandardSampler):
    """Every request draws the same numbers."""

    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        return super().sample(logits, [_with(row, seed=7) for row in rows])


class MasksIgnored(StandardSampler):
    """Knows no grammars."""

    def __init__(self, ops: OpTable) -> None:
        super().__init__(ops)


class MasksOfDraftsLost(StandardSampler):
    """Takes the mask of the first draft for all."""

    def begin(self, rows: Sequence[SequenceState], drafts: Sequence[list[int]]) -> None:
        super().begin(rows, drafts)
        for row in rows:
            place = row.sampler_state.place
            if place is not None and self._masks is not None:
                self._masks._wait()
                place.masks[:] = place.masks[0]


class PenaltyLeak(StandardSampler):
    """Every row is penalised as the first one is."""

    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        first = rows[0].params
        changes = {
            "repetition_penalty": first.repetition_penalty,
            "presence_penalty": first.presence_penalty,
            "logit_bias": first.logit_bias,
        }
        return super().sample(logits, [_with(row, **changes) for row in rows])


class BiasLeak(StandardSampler):
    """Biases of any row reach all."""

    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        together = {k: v for row in rows for k, v in (row.params.logit_bias or {}).items()}
        return super().sample(logits, [_with(r, logit_bias=together or None) for r in rows])


class PenaltyOfPrompt(StandardSampler):
    """Counts the prompt's tokens as generated ones."""

    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        changed = [_with(row) for row in rows]
        for row in changed:
            row.prompt_len = 0
        return super().sample(logits, changed)


class NanSwallowed(StandardSampler):
    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        return super().sample(logits.nan_to_num(), rows)


class NanSpreads(StandardSampler):
    """One bad row fails all."""

    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        tokens, failed = super().sample(logits, rows)
        if failed:
            return [], {row.seq_id: "not finite" for row in rows}
        return tokens, failed


class MinTokensIgnored(StandardSampler):
    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        return super().sample(logits, [_with(row, min_tokens=0) for row in rows])


class TemperatureSquared(StandardSampler):
    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        changed = [_with(row, temperature=row.params.temperature**2) for row in rows]
        return super().sample(logits, changed)


class RankFromZero(StandardSampler):
    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        tokens, failed = super().sample(logits, rows)
        return [self._told(token) for token in tokens], failed

    def _told(self, token: SampledTokens) -> SampledTokens:
        if token.logprobs is None:
            return token
        lower = [TokenLogprobs(t.token_ids, t.logprobs, t.rank - 1) for t in token.logprobs]
        return SampledTokens(token.seq_id, token.token_ids, lower)


class RowsSwapped(StandardSampler):
    """Gives two rows each other's tokens."""

    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        tokens, failed = super().sample(logits, rows)
        ids = [token.token_ids for token in tokens][::-1]
        return [SampledTokens(t.seq_id, i) for t, i in zip(tokens, ids, strict=True)], failed


class LateError(StandardSampler):
    """Works for 40 calls."""

    def __init__(self, ops: OpTable) -> None:
        super().__init__(ops)
        self._calls = 0

    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        self._calls += 1
        if self._calls > 40:
            raise RuntimeError("late")
        return super().sample(logits, rows)


class Hoards(StandardSampler):
    """Keeps 64 KiB for each row that it ever saw."""

    def sample(self, logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
        RETAINED.extend(bytearray(2**16) for _ in rows)
        return super().sample(logits, rows)


class Untyped(StandardSampler):
    """Takes a key whose value nobody checks."""

    def __init__(self, ops: OpTable, extra: Any = None) -> None:
        super().__init__(ops)
