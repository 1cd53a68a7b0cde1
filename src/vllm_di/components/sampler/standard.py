"""Chooses one token a row. A row's result depends on that row alone, whatever else is in the
batch."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_di.components.interfaces import OpTable, Sampler, SequenceState, StructuredOutput
from vllm_di.components.messages import SampledTokens, TokenLogprobs
from vllm_di.components.sampler.adjust import Adjustments, Known, adjust
from vllm_di.components.sampler.logprobs import report
from vllm_di.components.sampler.masks import GRAMMAR_FAULT, Masks, Place

NOT_FINITE = "the model gave logits that are not finite (NaN or infinity)"
NONE_LEFT = (
    "no token can be chosen: allowed_token_ids, bad_words, min_tokens and the grammar leave none"
)
TOO_LARGE = "a penalty took the model's logits beyond what a float holds"


class RowState:
    """What the sampler keeps of one sequence."""

    def __init__(self, row: SequenceState, known: Known, place: Place | None = None) -> None:
        """``place``: of a row with a grammar."""
        params = row.params
        self.params = params
        self.adjustments = Adjustments.of(row, known)
        self.place = place
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        self.seed = seed % 2**64


class Group:
    """What a set of rows wants. Kept for as long as the same rows come, step after step."""

    def __init__(self, states: list[RowState], device: torch.device, vocab_size: int) -> None:
        params = [state.params for state in states]
        self.states = states
        self.adjusted = [i for i, state in enumerate(states) if state.adjustments is not None]
        self.constrained = [i for i, state in enumerate(states) if state.place is not None]
        self.edited = bool(self.adjusted or self.constrained)
        self.reported = [i for i, p in enumerate(params) if p.logprobs is not None]
        self.counts = [params[i].logprobs or 0 for i in self.reported]
        self.greedy = [i for i, p in enumerate(params) if p.greedy]
        drawn = len(self.greedy) < len(states)
        self.draws = Draws(states, device, vocab_size) if drawn else None
        self.plain = not (drawn or self.edited or self.reported)


class Draws:
    """The rows of a group that are drawn, not greedy: their parameters as tensors."""

    def __init__(self, states: list[RowState], device: torch.device, vocab_size: int) -> None:
        self.rows = [i for i, state in enumerate(states) if not state.params.greedy]
        drawn = [states[i].params for i in self.rows]
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in drawn]
        real = torch.tensor(
            [[p.temperature, p.top_p, p.min_p] for p in drawn], dtype=torch.float32, device=device
        )
        self.temperature = real[:, :1]  # [rows, 1]
        self.top_k = torch.tensor(top_k, dtype=torch.int64, device=device)
        self.top_p, self.min_p = real[:, 1].contiguous(), real[:, 2].contiguous()
        self.seeds = np.array([states[i].seed for i in self.rows], np.uint64)


class StandardSampler(Sampler):
    """Penalties, masks, biases and grammars where a row asks for them; argmax or top-k, top-p,
    min-p by the op table."""

    request_faults = frozenset([NONE_LEFT, GRAMMAR_FAULT])

    def __init__(self, ops: OpTable, structured_output: StructuredOutput | None = None) -> None:
        """Without ``structured_output`` whoever holds the sampler sees to grammars."""
        self._masks = None if structured_output is None else Masks(structured_output)
        self._greedy, self._random = ops.greedy_sample, ops.top_k_top_p_sample
        self._group: Group | None = None
        self._known: Known = WeakValueDictionary()

    def close(self) -> None:
        """Ends the thread that works out masks."""
        if self._masks is not None:
            self._masks.close()

    def begin(self, rows: Sequence[SequenceState], drafts: Sequence[list[int]]) -> None:
        if self._masks is None:
            return
        wanted = [
            (row, place, guesses)
            for row, guesses in zip(rows, drafts, strict=True)
            if row.params.structured_output is not None
            if (place := (row.sampler_state or self._state(row)).place) is not None
        ]
        self._masks.begin(wanted)

    def sample(
        self, logits: Tensor, rows: Sequence[SequenceState]
    ) -> tuple[list[SampledTokens], dict[int, str]]:
        if not rows:
            return [], {}
        best = _listed(self._greedy(logits))
        if min(best) < 0:
            keep = [i for i, token in enumerate(best) if token >= 0]
            failed = {
                r.seq_id: NOT_FINITE for r, token in zip(rows, best, strict=True) if token < 0
            }
            tokens, others = self.sample(logits[keep], [rows[i] for i in keep])
            return tokens, failed | others
        group = self._grouped(logits, rows)
        if group.plain:  # nothing of torch's runs here: its first call of a step costs the most
            pairs = zip(rows, best, strict=True)
            return [SampledTokens(row.seq_id, [token]) for row, token in pairs], {}
        return self._sample_each(logits, rows, group, best)

    @torch.inference_mode()
    def _sample_each(
        self, logits: Tensor, rows: Sequence[SequenceState], group: Group, best: list[int]
    ) -> tuple[list[SampledTokens], dict[int, str]]:
        """Rows of finite logits, whose argmax is ``best``, as each one asks."""
        raw = self._raw(logits, group) if group.reported else None
        dead = self._adjust(logits, rows, group) if group.edited else {}
        if group.edited and group.greedy:
            best = _listed(self._greedy(logits))
        ids = self._choose(logits, rows, group, best)
        reports = self._reports(raw, ids, group)
        tokens = [
            SampledTokens(row.seq_id, [ids[i]], [reports[i]] if i in reports else None)
            for i, row in enumerate(rows)
            if i not in dead
        ]
        return tokens, {rows[i].seq_id: reason for i, reason in dead.items()}

    @torch.inference_mode()
    def warm_up(self, logits: Tensor) -> None:
        rows, vocab_size = logits.shape
        if self._masks is not None:
            self._masks.vocab_size = vocab_size
        self._greedy(logits)
        top_k = torch.full((rows,), vocab_size, dtype=torch.int64, device=logits.device)
        one = torch.ones(rows, dtype=torch.float32, device=logits.device)
        scaled = logits - logits.amax(-1, keepdim=True)
        self._random(scaled, top_k, one, torch.zeros_like(one), one / 2)

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, token_ids: Sequence[int], count: int
    ) -> list[TokenLogprobs]:
        return report(logits, token_ids, [count] * len(token_ids))

    def _grouped(self, logits: Tensor, rows: Sequence[SequenceState]) -> Group:
        states = [row.sampler_state or self._state(row) for row in rows]
        if self._group is None or self._group.states != states:
            self._group = Group(states, logits.device, logits.shape[-1])
        return self._group

    def _state(self, row: SequenceState) -> RowState:
        has_grammar = self._masks is not None and row.params.structured_output is not None
        place = Place() if has_grammar else None
        row.sampler_state = state = RowState(row, self._known, place)
        return state

    def _raw(self, logits: Tensor, group: Group) -> Tensor:
        """Logits before any adjustment, of the rows that report log-probabilities."""
        if group.edited or len(group.reported) < len(group.states):
            return logits[group.reported]  # a copy
        return logits

    def _adjust(
        self, logits: Tensor, rows: Sequence[SequenceState], group: Group
    ) -> dict[int, str]:
        """-> rows without a token to choose, and why; they get a harmless one, which nobody is
        told."""
        owned = [(i, rows[i], group.states[i].adjustments) for i in group.adjusted]
        places = [(i, rows[i], group.states[i].place) for i in group.constrained]
        dead: dict[int, str] = {}
        if self._masks is not None and places:
            masked = [(i, row, place) for i, row, place in places if place is not None]
            dead = self._masks.apply(logits, masked)
        adjust(logits, [(i, row, own) for i, row, own in owned if own is not None])
        peaks = logits.amax(-1).tolist()
        for i in {*group.adjusted, *group.constrained} - dead.keys():
            if not math.isfinite(peaks[i]):
                dead[i] = NONE_LEFT if peaks[i] == -math.inf else TOO_LARGE
        for i in dead:
            logits[i] = 0.0
        return dead

    def _choose(
        self, logits: Tensor, rows: Sequence[SequenceState], group: Group, best: list[int]
    ) -> list[int]:
        """``best``: the argmax of each row."""
        draws = group.draws
        if draws is None:
            return best
        positions = [rows[i].num_generated for i in draws.rows]
        if not group.greedy:
            return self._draw(logits, positions, draws)
        ids = list(best)
        for i, token in zip(
            draws.rows, self._draw(logits[draws.rows], positions, draws), strict=True
        ):
            ids[i] = token
        return ids

    def _draw(self, logits: Tensor, positions: list[int], draws: Draws) -> list[int]:
        """logits [rows, vocab] of the rows that are drawn."""
        # from the peak down, so that a small temperature cannot reach infinity
        scaled = (logits - logits.amax(-1, keepdim=True)).div_(draws.temperature)
        numbers = torch.from_numpy(uniform(draws.seeds, np.array(positions, np.uint64)))
        return _listed(
            self._random(scaled, draws.top_k, draws.top_p, draws.min_p, numbers.to(logits.device))
        )

    def _reports(
        self, raw: Tensor | None, ids: list[int], group: Group
    ) -> dict[int, TokenLogprobs]:
        if raw is None:
            return {}
        reports = report(raw, [ids[i] for i in group.reported], group.counts)
        return dict(zip(group.reported, reports, strict=True))


def _listed(token_ids: Tensor) -> list[int]:
    ids: list[int] = token_ids.tolist()
    return ids


def uniform(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float32]:
    """Numbers in [0, 1), each from a seed and a position alone: SplitMix64 (Steele, Lea, Flood
    2014)."""
    z = seeds + np.uint64(0x9E3779B97F4A7C15) * (positions + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    draws: npt.NDArray[np.float32] = (z >> np.uint64(40)).astype(np.float32)  # 24 bits: exact
    draws *= np.float32(2.0**-24)
    return draws
