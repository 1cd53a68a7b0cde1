"""Masks, biases and penalties, against a reference that goes one logit at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.components.sampler.rows import expected_adjusted, noise, row, sampler, token_of

from vllm_di.components.interfaces import SequenceState
from vllm_di.components.sampler.adjust import Adjustments, adjust

VOCAB = 40

CASES: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": {3: 5.0, 39: -100.0, 0: 0.5}},
    "allowed": {"allowed_token_ids": [7, 1, 7, 30]},
    "min_tokens": {"min_tokens": 4, "stop_token_ids": [8], "eos": [2, 3], "output": [5, 5, 9]},
    "min_tokens are out": {"min_tokens": 3, "eos": [2], "output": [5, 5, 9]},
    "min_tokens, eos ignored": {"min_tokens": 4, "eos": [2], "ignore_eos": True},
    "bad word of one token": {"bad_words": [[6]]},
    "bad word begun": {"bad_words": [[9, 4, 11], [4, 12], [9, 9, 13]], "output": [1, 9, 4]},
    "bad word longer than the output": {"bad_words": [[1, 2, 3, 9, 4]], "output": [9]},
    "bad word begun in the prompt": {"prompt": [1, 9], "bad_words": [[9, 4]]},
    "repetition": {"prompt": [1, 2, 2, 3], "output": [4, 4, 1], "repetition_penalty": 1.7},
    "repetition below one": {"prompt": [1, 2], "output": [4], "repetition_penalty": 0.4},
    "frequency": {"prompt": [1, 2, 2], "output": [4, 4, 2, 5, 4], "frequency_penalty": 0.9},
    "presence": {"prompt": [1, 2, 2], "output": [4, 4, 2], "presence_penalty": -1.3},
    "penalties without output": {"frequency_penalty": 1.0, "presence_penalty": 1.0},
    "all": {
        "prompt": [1, 2, 2, 3],
        "output": [4, 4, 1, 8],
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.7,
        "logit_bias": {4: 2.0, 8: -3.0},
        "allowed_token_ids": list(range(1, 12)),
        "bad_words": [[8, 5], [2]],
        "min_tokens": 6,
        "eos": [3],
        "stop_token_ids": [9],
    },
}


def adjusted(logits: torch.Tensor, rows: list[SequenceState]) -> torch.Tensor:
    owned = [(i, state, Adjustments.of(state)) for i, state in enumerate(rows)]
    adjust(logits, [(i, state, own) for i, state, own in owned if own is not None])
    return logits


def expected(logits: torch.Tensor, rows: list[SequenceState]) -> torch.Tensor:
    return torch.tensor(
        [expected_adjusted(one.tolist(), state) for one, state in zip(logits, rows, strict=True)]
    )


@pytest.mark.parametrize("name", CASES)
def test_one_row(name: str) -> None:
    logits, rows = noise(1, VOCAB), [row(**CASES[name])]
    torch.testing.assert_close(adjusted(logits.clone(), rows), expected(logits, rows))


def test_all_rows_at_once_and_rows_that_ask_for_nothing() -> None:
    rows = [row(), *(row(i, **case) for i, case in enumerate(CASES.values())), row()]
    logits = noise(len(rows), VOCAB)
    found = adjusted(logits.clone(), rows)
    torch.testing.assert_close(found, expected(logits, rows))
    assert torch.equal(found[0], logits[0]) and torch.equal(found[-1], logits[-1])


def test_counts_follow_the_tokens() -> None:
    """Adjustments that lived through the steps equal those made afresh."""
    case = CASES["all"] | {"output": []}
    state = row(**case)
    own = Adjustments.of(state)
    assert own is not None
    for step, token in enumerate([4, 4, 1, 8, 8, 30, 4, 2]):
        logits = noise(1, VOCAB, seed=step)
        found = logits.clone()
        adjust(found, [(0, state, own)])
        torch.testing.assert_close(found, expected(logits, [state]))
        state.token_ids.append(token)


def test_a_step_that_was_not_adjusted_is_counted_later() -> None:
    state = row(prompt=[1, 2], frequency_penalty=1.0, repetition_penalty=2.0)
    own = Adjustments.of(state)
    assert own is not None
    state.token_ids += [5, 5, 6]
    logits = noise(1, VOCAB)
    found = logits.clone()
    adjust(found, [(0, state, own)])
    torch.testing.assert_close(found, expected(logits, [state]))


def test_nothing_is_kept_for_a_request_that_asks_for_nothing() -> None:
    assert Adjustments.of(row(temperature=0.5, top_k=3, logprobs=2)) is None
    assert Adjustments.of(row(stop_token_ids=[4], ignore_eos=True, eos=[2])) is None


def test_an_empty_bad_word_is_no_word() -> None:
    assert token_of(noise(1, 9)[0], row(temperature=0, bad_words=[[]])) == int(noise(1, 9).argmax())


def test_a_penalty_does_not_need_the_vocabulary() -> None:
    """What is kept grows with the tokens seen, not with the vocabulary."""
    state = row(prompt=[1, 2, 3], output=[3, 4], repetition_penalty=1.1, frequency_penalty=0.1)
    sampler().sample(noise(1, 5000), [state])
    own = state.sampler_state.adjustments
    assert own.ids.tolist() == [1, 2, 3, 4]
    assert own.counts.tolist() == [0, 0, 1, 1]
