"""Greedy tokens of tiny models equal those of the reference."""

from __future__ import annotations

import json
import math

import pytest

from vllm_di.conformance import tiny
from vllm_di.conformance.compare import assert_same
from vllm_di.conformance.driving import Answer, ask, run
from vllm_di.conformance.golden import (
    HASHES,
    ROOMY,
    TOP,
    digest,
    goldens,
    larger_asks,
    larger_goldens,
    prompts,
)
from vllm_di.conformance.numbers import DTYPES
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.subject import Subject

SHARE = 0.1
"""Share of prompts that may differ in a narrow dtype."""
GAP = 0.05
"""Nats between two tokens that may swap in a narrow dtype."""
AMONG = 5


NARROW_LENGTH = 16
"""Tokens that are compared in a narrow dtype: an untrained model has many near ties, and after one
of them two answers have nothing in common."""


def size(subject: Subject, dtype: str) -> tuple[int, int]:
    """(prompts, tokens of each)."""
    count, length = (32, 128) if subject.full else (12, 32)
    return count, length if dtype == "float32" else NARROW_LENGTH


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", tiny.MODELS)
def test_tokens(subject: Subject, record: Record, model: str, dtype: str) -> None:
    """fp32: all equal. Narrower: equal, or at the first difference a swap of near equals."""
    subject.dtype(dtype)
    check_model(subject, model)
    record.feature(dtype)
    if model in tiny.FEATURES:
        record.feature(tiny.FEATURES[model])
    count, length = size(subject, dtype)
    wanted = goldens(model, subject.head_size, count, length)
    with subject.engine(f"model.dtype={dtype}", model=model) as engine:
        asks = [ask(prompt, length, logprobs=TOP) for prompt in prompts(count)]
        found = run(engine, asks)
    differing = 0
    for i, (answer, golden) in enumerate(zip(found, wanted, strict=True)):
        assert len(answer.token_ids) == length, f"prompt {i}: {len(answer.token_ids)} tokens"
        if answer.token_ids != golden.token_ids:
            differing += 1
            at = first_difference(answer, golden)
            ours, theirs = answer.token_ids[at], golden.token_ids[at]
            where = f"prompt {i}, token {at}: {ours}, the reference has {theirs}"
            assert dtype != "float32", where
            near = theirs in likeliest(answer, at) and ours in likeliest(golden, at)
            assert near, f"{where}: not among each other's {AMONG} likeliest"
            gap = logprob(golden, at, theirs) - logprob(golden, at, ours)
            assert gap < GAP, f"{where}: {gap:.3f} nat apart in the reference"
    record.figure(prompts=count, tokens=length, differing=differing)
    if dtype != "float32":
        allowed = math.ceil(SHARE * count)
        assert differing <= allowed, f"{differing} of {count} prompts differ, {allowed} may"


@pytest.mark.parametrize(
    ("model", "context"), [("wide", 40), ("long", 1024), ("long", 2300)], ids=str
)
def test_larger_models(subject: Subject, record: Record, model: str, context: int) -> None:
    """A vocabulary of 70,001 tokens, where most answers are ids above 32,768; contexts with more
    positions than a narrow dtype can count exactly."""
    if context > 1024 and not subject.full:
        raise NotDeclared("in the full form")
    wanted = larger_goldens(model, subject.head_size, context)
    if model == "wide":
        assert any(token > 65_536 for answer in wanted for token in answer.token_ids)
    with subject.engine(*ROOMY, f"model.dtype={subject.exact_dtype}", model=model) as engine:
        found = run(engine, larger_asks(model, context))
    record.figure(context=context, vocab=tiny.hf_config(model, subject.head_size)["vocab_size"])
    assert_same(found, wanted, subject.slack, f"{model}, {context} tokens")


@pytest.mark.parametrize("model", tiny.MODELS)
def test_the_reference_is_the_recorded_one(subject: Subject, model: str) -> None:
    """The hash of the whole goldens (32 prompts of 128 tokens), in the full form."""
    if not subject.full:
        raise NotDeclared("in the full form")
    recorded = json.loads(HASHES.read_text())
    assert digest(goldens(model, 32, 32, 128)) == recorded[model]


def check_model(subject: Subject, model: str) -> None:
    if model == "window" and not subject.declared.sliding_window:
        raise NotDeclared("sliding_window")


def first_difference(answer: Answer, golden: Answer) -> int:
    pairs = zip(answer.token_ids, golden.token_ids, strict=True)
    return next(i for i, (a, b) in enumerate(pairs) if a != b)


def likeliest(answer: Answer, at: int) -> list[int]:
    return answer.logprobs[at].token_ids[1 : 1 + AMONG]


def logprob(answer: Answer, at: int, token: int) -> float:
    told = answer.logprobs[at]
    return told.logprobs[told.token_ids.index(token)]
