"""The sampler: argmax, seeds, distributions, masks, penalties, and no leak between rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_di.components.interfaces import Sampler, SequenceState
from vllm_di.components.messages import SamplingParams
from vllm_di.conformance.subject import Subject

VOCAB = 320
LEAST_P = 1e-4


@contextmanager
def opened_sampler(subject: Subject) -> Iterator[tuple[Sampler, torch.device]]:
    with subject.parts("sampler", "device") as container:
        yield container.sampler(), container.device().torch_device


def row(
    seq_id: int, prompt: list[int] | None = None, out: list[int] | None = None, **params: Any
) -> SequenceState:
    prompt, out = prompt or [1, 2, 3], out or []
    return SequenceState(
        seq_id=seq_id,
        params=SamplingParams(**params),
        token_ids=[*prompt, *out],
        prompt_len=len(prompt),
        block_ids=[],
        eos_token_ids=[257],
        bad_words_token_ids=[],
    )


def logits_of(rows: int, seed: int, scale: float = 3.0, vocab: int = VOCAB) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def choose(
    sampler: Sampler, device: torch.device, logits: Tensor, rows: list[SequenceState]
) -> list[int]:
    """One token a row; none may fail."""
    tokens, failed = sampler.sample(logits.clone().to(device), rows)
    assert not failed, failed
    assert [t.seq_id for t in tokens] == [r.seq_id for r in rows], "tokens are of other rows"
    return [token.token_ids[0] for token in tokens]


def test_greedy_is_the_first_of_the_largest(subject: Subject) -> None:
    with opened_sampler(subject) as (sampler, device):
        logits = logits_of(8, subject.seed)
        logits[3] = logits[3].round()  # many ties
        logits[4] = 0.0
        logits[5, [7, 200, 319]] = 50.0
        rows = [row(i, temperature=0) for i in range(8)]
        first = [int((r == r.max()).nonzero()[0]) for r in logits]
        assert choose(sampler, device, logits, rows) == first


def test_a_seed_gives_the_same_tokens_again(subject: Subject) -> None:
    with opened_sampler(subject) as (sampler, device):
        logits = logits_of(16, subject.seed, 1.0)

        def draws() -> list[list[int]]:
            found = []
            for step in range(4):
                rows = [row(i, out=[5] * step, seed=100 + i) for i in range(16)]
                found.append(choose(sampler, device, logits, rows))
            return found

        first = draws()
        assert draws() == first, "the same seeds gave other tokens"
        assert len({tuple(step) for step in first}) > 1, "every step draws the same number"
        others = [row(i, seed=900 + i) for i in range(16)]
        assert choose(sampler, device, logits, others) != first[0], "seeds make no difference"


def test_draws_follow_the_distribution(subject: Subject) -> None:
    """Chi-square over many seeds, on a distribution of 24 tokens."""
    draws, batch = (100_000, 500) if subject.full else (20_000, 500)
    with opened_sampler(subject) as (sampler, device):
        one = logits_of(1, subject.seed, 1.0, vocab=24)
        counts = torch.zeros(24, dtype=torch.float64)
        for start in range(0, draws, batch):
            rows = [row(i, seed=start + i, temperature=0.8) for i in range(batch)]
            chosen = choose(sampler, device, one.expand(batch, -1), rows)
            counts += torch.bincount(torch.tensor(chosen), minlength=24)
        expected = (one[0].double() / 0.8).softmax(-1) * draws
        statistic = float(((counts - expected) ** 2 / expected).sum())
        p = chi_square_tail(statistic, 23)
        assert p > LEAST_P, f"p = {p:.2g}: not the distribution that was asked for"


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(X > statistic), X chi-square."""
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    found = torch.special.gammaincc(half, torch.tensor(statistic / 2, dtype=torch.float64))
    return float(found)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_k": 4},
        {"top_p": 0.5},
        {"top_p": 0.05},
        {"min_p": 0.3},
        {"top_k": 6, "top_p": 0.7, "min_p": 0.05},
        {"allowed_token_ids": [3, 5, 300]},
        {"top_k": 3, "temperature": 0.5},
    ],
    ids=str,
)
def test_only_the_allowed_set_is_drawn_and_all_of_it(
    subject: Subject, params: dict[str, Any]
) -> None:
    with opened_sampler(subject) as (sampler, device):
        one = logits_of(1, subject.seed, 0.8, vocab=VOCAB)
        kept = allowed_set(one[0], params)
        seen: set[int] = set()
        for start in range(0, 4000, 400):
            rows = [row(i, seed=start + i, **params) for i in range(400)]
            seen |= set(choose(sampler, device, one.expand(400, -1), rows))
        likely = {token for token, p in kept.items() if p > 0.01}
        assert seen <= set(kept), f"drew {sorted(seen - set(kept))}, which may not come"
        assert likely <= seen, f"never drew {sorted(likely - seen)}"


def allowed_set(logits: Tensor, params: dict[str, Any]) -> dict[int, float]:
    """Token to its probability, for the tokens that may be drawn."""
    wide = logits.double() / params.get("temperature", 1.0)
    if allowed := params.get("allowed_token_ids"):
        mask = torch.full_like(wide, -math.inf)
        mask[allowed] = 0
        wide = wide + mask
    values, ids = wide.sort(descending=True, stable=True)
    if k := params.get("top_k"):
        values[k:] = -math.inf
    probs = values.softmax(-1)
    before = probs.cumsum(-1) - probs
    keep = (before < params.get("top_p", 1.0)) & (probs >= params.get("min_p", 0.0) * probs[0])
    keep &= probs > 0
    keep[0] = True
    probs = probs * keep
    probs /= probs.sum()
    return {int(i): float(p) for i, p, k in zip(ids, probs, keep, strict=True) if k}


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"frequency_penalty": 1.1},
        {"presence_penalty": 1.3},
        {"presence_penalty": -0.9, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
        {"logit_bias": {7: 20.0, 9: -20.0}},
    ],
    ids=str,
)
def test_penalties_and_biases(subject: Subject, params: dict[str, Any]) -> None:
    """Greedy, by the formulas of vLLM's documentation, over several steps."""
    with opened_sampler(subject) as (sampler, device):
        generator = torch.Generator().manual_seed(subject.seed)
        rows, wanted, found = [], [], []
        for i in range(24):
            prompt = torch.randint(40, (6,), generator=generator).tolist()
            out = torch.randint(40, (9,), generator=generator).tolist()
            rows.append(row(i, prompt, out, temperature=0, **params))
        logits = logits_of(24, subject.seed, 1.0, vocab=40)
        for _step in range(3):
            wanted.append(
                [int(penalised(r, own).argmax()) for r, own in zip(logits, rows, strict=True)]
            )
            found.append(choose(sampler, device, logits, rows))
            for own, token in zip(rows, wanted[-1], strict=True):
                own.token_ids.append(token)
        assert found == wanted


def penalised(logits: Tensor, own: SequenceState) -> Tensor:
    """The logits of one row after bias, repetition, frequency and presence."""
    p, found = own.params, logits.double().clone()
    for token, bias in (p.logit_bias or {}).items():
        found[token] += bias
    for token in set(own.token_ids):
        factor = p.repetition_penalty
        found[token] = found[token] / factor if found[token] > 0 else found[token] * factor
    generated = own.token_ids[own.prompt_len :]
    for token in set(generated):
        found[token] -= p.frequency_penalty * generated.count(token) + p.presence_penalty
    return found


def test_ends_stay_away_before_min_tokens(subject: Subject) -> None:
    with opened_sampler(subject) as (sampler, device):
        logits = torch.zeros(2, VOCAB)
        logits[:, 257], logits[:, 9], logits[:, 4] = 30.0, 20.0, 10.0
        rows = [
            row(0, temperature=0, min_tokens=2, stop_token_ids=[9]),
            row(1, out=[4, 4], temperature=0, min_tokens=2, stop_token_ids=[9]),
        ]
        assert choose(sampler, device, logits, rows) == [4, 257]


def test_bad_words(subject: Subject) -> None:
    with opened_sampler(subject) as (sampler, device):
        logits = torch.zeros(2, VOCAB)
        logits[:, 8], logits[:, 5] = 20.0, 10.0
        rows = [row(0, out=[7], temperature=0), row(1, out=[6], temperature=0)]
        for own in rows:
            own.bad_words_token_ids = [[7, 8]]
        assert choose(sampler, device, logits, rows) == [5, 8]


def test_rows_do_not_leak(subject: Subject) -> None:
    """Each row's token is the same alone, in any order and beside any others."""
    with opened_sampler(subject) as (sampler, device):
        settings: list[dict[str, Any]] = [
            {"temperature": 0},
            {"seed": 3},
            {"seed": 4, "top_k": 5},
            {"temperature": 0, "repetition_penalty": 1.8},
            {"temperature": 0, "logit_bias": {17: 30.0}},
            {"seed": 5, "presence_penalty": 1.5, "frequency_penalty": 1.0},
            {"temperature": 0, "allowed_token_ids": [33, 44]},
            {"seed": 6, "top_p": 0.4},
        ]
        logits = logits_of(len(settings), subject.seed, 1.0)

        def rows() -> list[SequenceState]:
            return [row(i, [1, i, 9], [i, 4, 4], **s) for i, s in enumerate(settings)]

        alone = [choose(sampler, device, logits[i : i + 1], [r])[0] for i, r in enumerate(rows())]
        assert choose(sampler, device, logits, rows()) == alone, "together they get other tokens"
        for seed in range(4):
            order = torch.randperm(len(alone), generator=torch.Generator().manual_seed(seed))
            mixed = rows()
            found = choose(sampler, device, logits[order], [mixed[i] for i in order.tolist()])
            assert found == [alone[i] for i in order.tolist()], "another order, other tokens"


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_of_nan_fails_alone(subject: Subject, poison: float) -> None:
    with opened_sampler(subject) as (sampler, device):
        logits = logits_of(3, subject.seed)
        logits[1, 50] = poison
        rows = [row(10 + i, temperature=0) for i in range(3)]
        tokens, failed = sampler.sample(logits.clone().to(device), rows)
        assert set(failed) == {11}, f"rows that failed: {failed}"
        good = {t.seq_id: t.token_ids[0] for t in tokens}
        assert good == {10: int(logits[0].argmax()), 12: int(logits[2].argmax())}


def test_logprobs(subject: Subject) -> None:
    """Those of the untouched logits: the chosen token first, then the likeliest, with its rank."""
    with opened_sampler(subject) as (sampler, device):
        logits = logits_of(4, subject.seed)
        rows = [row(i, seed=i, logprobs=i, top_k=50) for i in range(4)]
        tokens, failed = sampler.sample(logits.clone().to(device), rows)
        assert not failed
        exact = logits.double().log_softmax(-1)
        for i, token in enumerate(tokens):
            assert token.logprobs is not None
            (told,), (chosen,) = token.logprobs, token.token_ids
            assert len(told.token_ids) == i + 1
            assert told.token_ids[0] == chosen
            assert told.token_ids[1:] == exact[i].argsort(descending=True)[:i].tolist()
            wanted = exact[i, told.token_ids]
            torch.testing.assert_close(
                torch.tensor(told.logprobs, dtype=torch.float64), wanted, rtol=0, atol=1e-4
            )
            assert told.rank == int((exact[i] > exact[i, chosen]).sum()) + 1
        scored = sampler.prompt_logprobs(logits.clone().to(device), [9, 8, 7, 6], 2)
        for i, (told, chosen) in enumerate(zip(scored, [9, 8, 7, 6], strict=True)):
            assert told.token_ids == [chosen, *exact[i].argsort(descending=True)[:2].tolist()]
            assert abs(told.logprobs[0] - float(exact[i, chosen])) < 1e-4
