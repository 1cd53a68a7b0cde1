"""Chooses one token a row. A row's result depends on that row alone, whatever else is in the
batch."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_di.components.interfaces import OpTable, Sampler, SequenceState
from vllm_di.components.messages import SampledToken, TokenLogprobs
from vllm_di.components.sampler.adjust import Adjustments

MASK64 = (1 << 64) - 1


class RowState:
    """What the sampler keeps of one sequence."""

    def __init__(self, row: SequenceState) -> None:
        params = row.params
        # ids that would end the sequence: kept away until min_tokens are out
        ends = [*row.eos_token_ids, *params.stop_token_ids]
        self.adjustments = Adjustments.of(params, ends, row.bad_words_token_ids)
        self.greedy = params.greedy
        self.plain = self.greedy and self.adjustments is None and params.logprobs is None
        self.seed = secrets.randbits(64) if params.seed is None else params.seed & MASK64


class StandardSampler(Sampler):
    """Penalties, masks and biases where a row asks for them; argmax or top-k, top-p, min-p by the
    op table."""

    def __init__(self, ops: OpTable) -> None:
        self._greedy, self._random = ops.greedy_sample, ops.top_k_top_p_sample

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, rows: Sequence[SequenceState]
    ) -> tuple[list[SampledToken], dict[int, str]]:
        states = [self._state(row) for row in rows]
        finite = torch.isfinite(logits.amax(-1)).tolist()  # amax passes NaN on
        failed = {
            row.seq_id: "the model gave logits that are not finite (NaN or infinity)"
            for row, good in zip(rows, finite, strict=True)
            if not good
        }
        if failed:
            keep = [i for i, good in enumerate(finite) if good]
            rows, states = [rows[i] for i in keep], [states[i] for i in keep]
            logits = logits[keep]
        if not rows:
            return [], failed
        if all(state.plain for state in states):
            ids = self._greedy(logits).tolist()
            pairs = zip(rows, ids, strict=True)
            return [SampledToken(row.seq_id, token) for row, token in pairs], failed
        raw = self._raw_logprobs(logits, rows)
        for i, (row, state) in enumerate(zip(rows, states, strict=True)):
            if state.adjustments is not None:
                state.adjustments.apply(logits[i], row.token_ids, row.prompt_len)
        ids = self._choose(logits, rows, states)
        return [
            SampledToken(row.seq_id, token, self._logprobs(raw.get(i), row, token))
            for i, (row, token) in enumerate(zip(rows, ids, strict=True))
        ], failed

    def prompt_logprobs(
        self, logits: Tensor, token_ids: Sequence[int], count: int
    ) -> list[TokenLogprobs]:
        with torch.inference_mode():
            logprobs = logits.log_softmax(-1)
            return [
                describe(row, token, count) for row, token in zip(logprobs, token_ids, strict=True)
            ]

    def _state(self, row: SequenceState) -> RowState:
        state = row.sampler_state
        if state is None:
            state = row.sampler_state = RowState(row)
        assert isinstance(state, RowState)
        return state

    def _choose(
        self, logits: Tensor, rows: Sequence[SequenceState], states: Sequence[RowState]
    ) -> list[int]:
        drawn = [i for i, state in enumerate(states) if not state.greedy]
        if not drawn:
            return [int(i) for i in self._greedy(logits).tolist()]
        ids = [0] * len(rows)
        argmax = [i for i, state in enumerate(states) if state.greedy]
        if argmax:
            for i, token in zip(argmax, self._greedy(logits[argmax]).tolist(), strict=True):
                ids[i] = token
            logits = logits[drawn]
        params = [rows[i].params for i in drawn]
        vocab = logits.shape[-1]
        temperature = torch.tensor([p.temperature for p in params], device=logits.device)
        tokens = self._random(
            logits / temperature[:, None],
            torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params], device=logits.device),
            torch.tensor([p.top_p for p in params], device=logits.device),
            torch.tensor([p.min_p for p in params], device=logits.device),
            torch.tensor(
                [uniform(states[i].seed, rows[i].num_generated) for i in drawn],
                device=logits.device,
            ),
        )
        for i, token in zip(drawn, tokens.tolist(), strict=True):
            ids[i] = token
        return ids

    def _raw_logprobs(self, logits: Tensor, rows: Sequence[SequenceState]) -> dict[int, Tensor]:
        """Log-probabilities before any adjustment, for the rows that report them."""
        wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        if not wanted:
            return {}
        return dict(zip(wanted, logits[wanted].log_softmax(-1), strict=True))

    def _logprobs(self, raw: Tensor | None, row: SequenceState, token: int) -> TokenLogprobs | None:
        if raw is None or row.params.logprobs is None:
            return None
        return describe(raw, token, row.params.logprobs)


def describe(logprobs: Tensor, token: int, count: int) -> TokenLogprobs:
    """logprobs [vocab]; the token first, then the ``count`` most likely."""
    value = logprobs[token]
    rank = int((logprobs > value).sum()) + 1
    top = logprobs.topk(count)
    return TokenLogprobs([token, *top.indices.tolist()], [float(value), *top.values.tolist()], rank)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a seed and a position alone: SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return ((z ^ (z >> 31)) >> 40) / (1 << 24)  # 24 bits: exact in fp32, below 1
