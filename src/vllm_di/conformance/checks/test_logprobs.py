"""Log-probabilities of tiny models beside the reference, under the reference's own tokens."""

from __future__ import annotations

import math

import pytest

from vllm_di.components.messages import TokenLogprobs
from vllm_di.conformance import tiny
from vllm_di.conformance.checks.test_golden import check_model
from vllm_di.conformance.driving import run
from vllm_di.conformance.golden import scored, teacher_forced
from vllm_di.conformance.numbers import DTYPES
from vllm_di.conformance.outcomes import Record
from vllm_di.conformance.subject import Subject

LARGEST = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest difference of one token's log-prob, in nats."""
MEAN_DIVERGENCE = 1e-3
"""Kullback-Leibler divergence of the reference's distribution from ours, in nats; the mean over all
positions."""
COUNT, LENGTH = 12, 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", tiny.MODELS)
def test_logprobs(subject: Subject, record: Record, model: str, dtype: str) -> None:
    """The reference's prompts with their answers are the prompts here: every position is scored,
    and nothing depends on what was sampled before."""
    subject.dtype(dtype)
    check_model(subject, model)
    record.feature(dtype)
    size = subject.head_size
    wanted = scored(model, size, COUNT, LENGTH)
    with subject.engine(f"model.dtype={dtype}", model=model) as engine:
        found = run(engine, teacher_forced(model, size, COUNT, LENGTH))
    worst = total = 0.0
    positions = 0
    for i, (answer, golden) in enumerate(zip(found, wanted, strict=True)):
        ours, theirs = answer.prompt_logprobs, golden.prompt_logprobs
        assert len(ours) == len(theirs), f"prompt {i}: {len(ours)} positions scored"
        for told, reference in zip(ours, theirs, strict=True):
            difference = abs(told.logprobs[0] - reference.logprobs[0])
            divergence = kl(reference, told)
            assert not math.isnan(difference + divergence), f"prompt {i}: NaN"
            worst, total = max(worst, difference), total + divergence
            positions += 1
    mean = total / positions
    record.figure(worst=worst, mean_divergence=mean, positions=positions)
    assert worst <= LARGEST[dtype], f"off by {worst:.2g} nat, {LARGEST[dtype]} may be"
    assert mean < MEAN_DIVERGENCE, f"diverges by {mean:.2g} nat on average"


def kl(one: TokenLogprobs, other: TokenLogprobs) -> float:
    """The divergence of ``one`` from ``other`` over the tokens that both name, with all others as
    one. Never more than that over the whole vocabulary (log sum inequality)."""
    p = dict(zip(one.token_ids, map(math.exp, one.logprobs), strict=True))
    q = dict(zip(other.token_ids, map(math.exp, other.logprobs), strict=True))
    both = p.keys() & q.keys()
    rest_p, rest_q = (max(1 - sum(x[token] for token in both), 1e-12) for x in (p, q))
    named = sum(p[token] * math.log(p[token] / q[token]) for token in both)
    return named + rest_p * math.log(rest_p / rest_q)
