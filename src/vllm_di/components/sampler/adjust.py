"""What a request may do to its logits before a token is chosen: masks, biases, penalties.

Everything is a short list of token ids, never an array of the vocabulary's size: a step edits the
few logits concerned, of all rows at once. Order and meaning are vLLM's: allowed ids, bad words,
min_tokens, bias, repetition, frequency, presence.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_di.components.interfaces import SequenceState

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]
NEVER = float("-inf")


class Arrays:
    """A request's lists as the sampler wants them. Its texts have the same lists, and share
    these."""

    def __init__(self, row: SequenceState) -> None:
        params, bias = row.params, row.params.logit_bias or {}
        self.sources = sources(row)  # held: their identities are the key
        self.allowed: Ids | None = None
        if params.allowed_token_ids is not None:
            self.allowed = np.array(params.allowed_token_ids, np.int64)
        self.bias_ids: Ids = np.array(list(bias), np.int64)
        self.bias: Values = np.array(list(bias.values()), np.float32)
        self.bad_tokens = [word[0] for word in row.bad_words_token_ids if len(word) == 1]
        self.bad_after: dict[int, list[list[int]]] = {}
        """Longer bad words, by their last token but one."""
        for word in row.bad_words_token_ids:
            if len(word) > 1:
                self.bad_after.setdefault(word[-2], []).append(word)


def sources(row: SequenceState) -> tuple[object, ...]:
    """What ``Arrays`` are made of."""
    params = row.params
    return params.allowed_token_ids, params.logit_bias, row.bad_words_token_ids


Known = MutableMapping[tuple[int, ...], Arrays]
"""Arrays that live, by the identities of their sources."""


class Adjustments:
    """Masks, biases and penalties of one sequence. Its tokens are counted as they come."""

    @classmethod
    def of(cls, row: SequenceState, known: Known | None = None) -> Adjustments | None:
        """None for a request that leaves its logits alone."""
        params = row.params
        wanted = (
            params.logit_bias
            or params.allowed_token_ids is not None
            or row.bad_words_token_ids
            or params.min_tokens
            or params.presence_penalty
            or params.frequency_penalty
            or params.repetition_penalty != 1.0
        )
        if not wanted:
            return None
        key = tuple(map(id, sources(row)))
        arrays = None if known is None else known.get(key)
        if arrays is None:
            arrays = Arrays(row)
            if known is not None:
                known[key] = arrays
        return cls(row, arrays)

    def __init__(self, row: SequenceState, arrays: Arrays) -> None:
        params = row.params
        self.arrays = arrays
        self.allowed, self.bias_ids, self.bias = arrays.allowed, arrays.bias_ids, arrays.bias
        self.repetition = params.repetition_penalty
        self.frequency, self.presence = params.frequency_penalty, params.presence_penalty
        self._min_tokens = params.min_tokens
        # ids that would end the sequence: kept away until min_tokens are out, ignore_eos or not
        self._ends = (
            sorted({*row.eos_token_ids, *params.stop_token_ids}) if self._min_tokens else []
        )
        self._counts_prompt = self.repetition != 1.0
        self.penalised = bool(self._counts_prompt or self.frequency or self.presence)
        self.ids: Ids = np.zeros(0, np.int64)  # ids seen, each once
        self.counts: Values = np.zeros(0, np.float32)  # times in the output; 0: prompt alone
        self._place: dict[int, int] = {}
        self._num_counted = 0 if self._counts_prompt else row.prompt_len

    def banned(self, row: SequenceState) -> list[int]:
        """Ids that may not come now: ends before min_tokens, last parts of bad words."""
        generated = row.num_generated
        banned = self._ends.copy() if generated < self._min_tokens else []
        banned += self.arrays.bad_tokens
        if generated and self.arrays.bad_after:
            tokens = row.token_ids
            for word in self.arrays.bad_after.get(tokens[-1], ()):
                before = len(word) - 1  # tokens that must have been generated for it to be complete
                if before <= generated and tokens[len(tokens) - before :] == word[:-1]:
                    banned.append(word[-1])
        return banned

    def count(self, row: SequenceState) -> None:
        """Take in the tokens that came since the last call."""
        tokens, done = row.token_ids, self._num_counted
        fresh = [t for t in dict.fromkeys(tokens[done:]) if t not in self._place]
        if fresh:
            self._place |= zip(fresh, range(len(self.ids), len(self.ids) + len(fresh)), strict=True)
            self.ids = np.concatenate((self.ids, np.array(fresh, np.int64)))
            self.counts = np.concatenate((self.counts, np.zeros(len(fresh), np.float32)))
        for token in tokens[max(done, row.prompt_len) :]:
            self.counts[self._place[token]] += 1
        self._num_counted = len(tokens)


Adjusted = Sequence[tuple[int, SequenceState, Adjustments]]
"""Row of the logits, its sequence, its adjustments."""


def adjust(logits: Tensor, rows: Adjusted) -> None:
    """logits [rows, vocab] fp32, changed in place."""
    _mask(logits, rows)
    biased = [(i, own) for i, _, own in rows if len(own.bias_ids)]
    if biased:
        place = _places(logits, biased, [own.bias_ids for _, own in biased])
        logits[place] += _tensor(np.concatenate([own.bias for _, own in biased]), logits)
    penalised = [(i, row, own) for i, row, own in rows if own.penalised]
    if penalised:
        for _, row, own in penalised:
            own.count(row)
        _penalise(logits, [(i, own) for i, _, own in penalised])


def _mask(logits: Tensor, rows: Adjusted) -> None:
    banned_rows: list[int] = []
    banned_ids: list[int] = []
    for i, row, own in rows:
        if own.allowed is not None:
            allowed = _tensor(own.allowed, logits)
            kept = logits[i, allowed]
            logits[i] = NEVER
            logits[i, allowed] = kept
        banned = own.banned(row)
        banned_rows += [i] * len(banned)
        banned_ids += banned
    if banned_ids:
        device = logits.device
        place = (
            torch.tensor(banned_rows, dtype=torch.int64, device=device),
            torch.tensor(banned_ids, dtype=torch.int64, device=device),
        )
        logits[place] = NEVER


def _penalise(logits: Tensor, rows: Sequence[tuple[int, Adjustments]]) -> None:
    lengths = [len(own.ids) for _, own in rows]
    place = _places(logits, rows, [own.ids for _, own in rows])
    counts = _tensor(np.concatenate([own.counts for _, own in rows]), logits)

    def spread(values: list[float]) -> Tensor:
        return _tensor(np.repeat(np.array(values, np.float32), lengths), logits)

    values = logits[place]
    factor = spread([own.repetition for _, own in rows])
    values = torch.where(values > 0, values / factor, values * factor)
    values -= spread([own.frequency for _, own in rows]) * counts
    values -= spread([own.presence for _, own in rows]) * (counts > 0)
    logits[place] = values


def _places(
    logits: Tensor, rows: Sequence[tuple[int, Adjustments]], ids: list[Ids]
) -> tuple[Tensor, Tensor]:
    """(row, id) of each logit concerned. No pair is there twice, so that order cannot matter."""
    owner = np.repeat(np.array([i for i, _ in rows], np.int64), [len(one) for one in ids])
    return _tensor(owner, logits), _tensor(np.concatenate(ids), logits)


def _tensor(values: Ids | Values, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)
