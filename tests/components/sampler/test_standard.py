"""Choosing: greedy, drawn, seeded, and rows that fail alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.components.sampler.rows import check_logprobs, noise, row, same, sampler, token_of

from vllm_di.components.interfaces import SequenceState
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.sampler.standard import StandardSampler, uniform


def test_greedy_takes_the_lowest_id_on_a_tie() -> None:
    logits = torch.zeros(3, 6)
    logits[0, [2, 4]] = 5.0
    logits[2, 5] = 1.0
    tokens, failed = sampler().sample(logits, [row(i, temperature=0) for i in (7, 8, 9)])
    assert [(t.seq_id, t.token_ids[0]) for t in tokens] == [(7, 2), (8, 0), (9, 5)]
    assert failed == {}
    assert all(t.logprobs is None for t in tokens)


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = noise(1, 500)[0]
    assert token_of(logits, row(temperature=temperature)) == int(logits.argmax())


def test_a_small_temperature_on_huge_logits_stays_finite() -> None:
    logits = torch.tensor([1e36, 3e38, -3e38, 2e38])
    assert token_of(logits, row(temperature=2e-5)) == 1


def test_no_rows() -> None:
    assert sampler().sample(torch.empty(0, 5), []) == ([], {})


# -- draws ----------------------------------------------------------------------------------------


def draws(logits: torch.Tensor, num_rows: int, num_steps: int, **params: Any) -> torch.Tensor:
    """How often each token came, over seeds 0, 1, ... and positions 0, 1, ... -> [vocab]."""
    rows = [row(i, seed=i, max_tokens=None, **params) for i in range(num_rows)]
    chooser, counts = sampler(), torch.zeros(len(logits), dtype=torch.float64)
    for _ in range(num_steps):
        tokens, failed = chooser.sample(logits.repeat(num_rows, 1), rows)
        assert not failed
        for state, token in zip(rows, tokens, strict=True):
            state.token_ids.append(token.token_ids[0])
        ids = torch.tensor([t.token_ids[0] for t in tokens])
        counts.index_add_(0, ids, torch.ones(num_rows, dtype=torch.float64))
    return counts


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    assert bool((counts[expected == 0] == 0).all())
    kept = expected > 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())


CRITICAL = 76.0
"""Chi-square of 31 degrees of freedom exceeds it once in 100,000."""


@pytest.mark.parametrize(
    ("num_rows", "num_steps"), [(1000, 100), (20, 1000)], ids=["many seeds", "long sequences"]
)
def test_draws_follow_the_distribution(num_rows: int, num_steps: int) -> None:
    logits = noise(1, 32, scale=1.0)[0]
    counts = draws(logits, num_rows, num_steps, temperature=0.7)
    probabilities = (logits.double() / 0.7).softmax(-1)
    assert chi_square(counts, probabilities) < CRITICAL


def test_draws_within_top_k_top_p_min_p() -> None:
    logits = noise(1, 32, scale=1.0)[0]
    probabilities = logits.double().softmax(-1)
    order = probabilities.sort(descending=True)
    kept = order.indices[:12]  # top_k, then the fewest of these that reach 0.9 of their mass
    mass = order.values[:12] / order.values[:12].sum()
    kept = kept[: int((mass.cumsum(0) < 0.9).sum()) + 1]
    kept = kept[probabilities[kept] >= 0.15 * probabilities.max()]
    assert 1 < len(kept) < 12
    expected = torch.zeros(32, dtype=torch.float64)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    counts = draws(logits, 400, 50, top_k=12, top_p=0.9, min_p=0.15)
    assert chi_square(counts, expected) < CRITICAL


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_narrowest_choice_is_the_likeliest(params: dict[str, Any]) -> None:
    logits = noise(1, 400)[0]
    assert token_of(logits, row(seed=5, temperature=2.0, **params)) == int(logits.argmax())


def test_top_k_beyond_the_vocabulary_is_off() -> None:
    logits = noise(40, 8, scale=0.5)
    free = sampler().sample(logits.clone(), [row(i, seed=i) for i in range(40)])
    wide = sampler().sample(logits.clone(), [row(i, seed=i, top_k=2**31 - 1) for i in range(40)])
    off = sampler().sample(logits.clone(), [row(i, seed=i, top_k=-1) for i in range(40)])
    assert free == wide == off


# -- seeds ----------------------------------------------------------------------------------------


def generate(state: SequenceState, steps: int = 30) -> list[int]:
    chooser = sampler()
    for step in range(steps):
        tokens, _ = chooser.sample(noise(1, 300, seed=step, scale=1.0), [state])
        state.token_ids.append(tokens[0].token_ids[0])
    return state.token_ids[state.prompt_len :]


def test_a_seed_repeats_and_another_one_differs() -> None:
    first = generate(row(seed=11))
    assert generate(row(9, prompt=[5, 6, 7], seed=11)) == first
    assert generate(row(seed=12)) != first
    assert generate(row(seed=-1)) == generate(row(seed=-1)) != first


def test_a_seeded_sequence_goes_on_after_a_preemption() -> None:
    whole = generate(row(seed=11))
    chooser, state = sampler(), row(3, output=whole[:12], seed=11)
    for step in range(12, 30):
        tokens, _ = chooser.sample(noise(1, 300, seed=step, scale=1.0), [state])
        state.token_ids.append(tokens[0].token_ids[0])
    assert state.token_ids[1:] == whole


def test_without_a_seed_each_sequence_has_its_own() -> None:
    runs = {tuple(generate(row())) for _ in range(5)}
    assert len(runs) == 5


def test_uniform_is_splitmix64() -> None:
    # the first three outputs for seed 0, as published with the algorithm
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    found = uniform(np.zeros(3, np.uint64), np.arange(3, dtype=np.uint64))
    assert found.dtype == np.float32
    assert found.tolist() == [(value >> 40) / 2**24 for value in published]
    seeds = np.arange(20_000, dtype=np.uint64)
    many = uniform(seeds, seeds % np.uint64(7))
    assert many.min() >= 0.0 and many.max() < 1.0
    assert abs(float(many.mean()) - 0.5) < 0.01


# -- rows that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 17, 99])
def test_a_broken_row_fails_alone(poison: float, place: int, temperature: float) -> None:
    logits = noise(4, 100)
    rows = [row(i, seed=i, temperature=temperature, logprobs=2) for i in range(4)]
    good, _ = sampler().sample(logits.clone(), rows)
    logits[2, place] = poison
    tokens, failed = sampler().sample(logits, rows)
    assert list(failed) == [2] and "not finite" in failed[2]
    assert tokens == [good[0], good[1], good[3]]


def test_all_rows_broken() -> None:
    logits = torch.full((2, 9), math.nan)
    tokens, failed = sampler().sample(logits, [row(4), row(5, temperature=0)])
    assert tokens == [] and set(failed) == {4, 5}


def test_minus_infinity_is_a_mask_of_the_model() -> None:
    logits = torch.full((2, 9), -math.inf)
    logits[:, 6] = -2.0
    tokens, failed = sampler().sample(logits, [row(4, seed=1), row(5, temperature=0)])
    assert [t.token_ids[0] for t in tokens] == [6, 6] and not failed
    nothing = torch.full((1, 9), -math.inf)
    assert list(sampler().sample(nothing, [row(4)])[1]) == [4]


def test_masks_that_leave_nothing_fail_the_row_alone() -> None:
    rows = [
        row(0, seed=3, logprobs=1),
        row(1, allowed_token_ids=[2, 3], eos=[2], min_tokens=1, bad_words=[[3]], logprobs=1),
        row(2, temperature=0),
    ]
    logits = noise(3, 50)
    alone, _ = sampler().sample(logits[:1].clone(), rows[:1])
    tokens, failed = sampler().sample(logits, rows)
    assert list(failed) == [1] and "leave none" in failed[1]
    assert tokens[0] == alone[0] and [t.seq_id for t in tokens] == [0, 2]


def test_a_penalty_beyond_floats_fails_the_row_alone() -> None:
    rows = [row(0, prompt=[3], repetition_penalty=0.01, temperature=0), row(1, temperature=0)]
    logits = torch.full((2, 9), 1e37)
    tokens, failed = sampler().sample(logits, rows)
    assert list(failed) == [0] and "beyond what a float holds" in failed[0]
    assert failed[0] not in sampler().request_faults, "it is not the request's fault alone"
    assert [t.seq_id for t in tokens] == [1]


# -- log-probabilities ----------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits() -> None:
    raw = noise(3, 200)
    rows = [
        row(0, temperature=0, logprobs=0),
        row(1, temperature=0.3, seed=2, top_k=5, logprobs=4, logit_bias={7: 50.0}),
        row(2, temperature=1.5, seed=3, logprobs=20, presence_penalty=1.0, output=[4, 5]),
    ]
    tokens, _ = sampler().sample(raw.clone(), rows)
    assert tokens[1].token_ids[0] == 7
    for i, token in enumerate(tokens):
        assert token.logprobs is not None
        check_logprobs(token.logprobs[0], raw[i], token.token_ids[0], rows[i].params.logprobs or 0)


def test_rows_without_logprobs_get_none() -> None:
    tokens, _ = sampler().sample(noise(2, 30), [row(0, logprobs=1), row(1)])
    assert tokens[0].logprobs is not None and tokens[1].logprobs is None


def test_more_alternatives_than_tokens() -> None:
    tokens, _ = sampler().sample(noise(1, 5), [row(0, logprobs=20, temperature=0)])
    assert tokens[0].logprobs is not None
    check_logprobs(tokens[0].logprobs[0], noise(1, 5)[0], tokens[0].token_ids[0], 5)


@pytest.mark.parametrize("count", [0, 3, 20])
def test_prompt_logprobs(count: int) -> None:
    logits = noise(150, 64)
    ids = [(i * 29) % 64 for i in range(150)]
    found = sampler().prompt_logprobs(logits.clone(), ids, count)
    for i, one in enumerate(found):
        check_logprobs(one, logits[i], ids[i], count)
    assert len(found) == 150
    assert sampler().prompt_logprobs(logits[70:71].clone(), ids[70:71], count) == found[70:71]


# -- cost -----------------------------------------------------------------------------------------


class Counted(TorchOps):
    """Counts what the sampler asks of the op table."""

    def __init__(self) -> None:
        self.greedy, self.random = 0, 0

    def greedy_sample(self, logits: torch.Tensor) -> torch.Tensor:
        self.greedy += 1
        return super().greedy_sample(logits)

    def top_k_top_p_sample(
        self,
        logits: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        self.random += 1
        assert top_k.dtype == torch.int64
        assert all(x.dtype == torch.float32 for x in (logits, top_p, min_p, uniform))
        assert all(x.shape == logits.shape[:1] for x in (top_k, top_p, min_p, uniform))
        return super().top_k_top_p_sample(logits, top_k, top_p, min_p, uniform)


def test_each_op_is_called_once_for_all_rows_that_need_it() -> None:
    ops = Counted()
    chooser = StandardSampler(ops)
    chooser.sample(noise(6, 40), [row(i, temperature=0) for i in range(6)])
    assert (ops.greedy, ops.random) == (1, 0)
    chooser.sample(noise(6, 40), [row(i) for i in range(6)])
    assert (ops.greedy, ops.random) == (2, 1)  # each row's peak tells whether it is finite
    chooser.sample(noise(6, 40), [row(i, temperature=i % 2, top_p=1, min_p=0) for i in range(6)])
    assert (ops.greedy, ops.random) == (3, 2)
    biased = [row(i, logit_bias={1: 2.0}, temperature=0) for i in range(6)]
    chooser.sample(noise(6, 40), biased)
    assert (ops.greedy, ops.random) == (5, 2)  # before the biases, and behind them


def test_a_batch_that_changes_is_not_mistaken_for_the_one_before() -> None:
    chooser, logits = sampler(), noise(2, 100)
    first = [row(0, seed=1), row(1, temperature=0)]
    for rows in (first, first[::-1], first, [row(0, seed=2), first[1]], first[:1], first):
        tokens, _ = chooser.sample(logits[: len(rows)].clone(), rows)
        for i, state in enumerate(rows):
            alone, _ = sampler().sample(logits[i : i + 1].clone(), [state])
            assert same(tokens[i], alone[0])


def test_texts_with_the_same_lists_share_their_arrays() -> None:
    allowed, bias, words = [3, 4, 5], {4: 1.0}, [[3], [4, 5]]
    rows = [row(i, seed=i, allowed_token_ids=allowed, logit_bias=bias) for i in range(3)]
    for state in rows:
        state.bad_words_token_ids = words
        state.params = copy.copy(state.params)  # a struct of its own, with the same lists
    own = sampler()
    own.sample(noise(3, 50), rows)
    assert len(own._known) == 1
    assert len({id(state.sampler_state.adjustments.arrays) for state in rows}) == 1
    own._group = None
    for state in rows:
        state.sampler_state = None
    assert not own._known, "nothing is held for sequences that are gone"
