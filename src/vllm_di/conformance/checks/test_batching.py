"""What a request gets does not depend on who shares its batch."""

from __future__ import annotations

import random

import pytest

from vllm_di.components.messages import SamplingParams
from vllm_di.conformance.compare import assert_same
from vllm_di.conformance.driving import Answer, Ask, apart, ask, run
from vllm_di.conformance.golden import prompts
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.subject import Subject

LENGTH = 16
SIZES = (2, 3, 8)


def asks(count: int) -> list[Ask]:
    return [ask(prompt, LENGTH, logprobs=20, prompt_logprobs=0) for prompt in prompts(count)]


def one_by_one(subject: Subject, count: int) -> list[Answer]:
    with subject.engine(*exact(subject)) as engine:
        return [run(engine, [one])[0] for one in asks(count)]


def exact(subject: Subject, *more: str) -> list[str]:
    return [f"model.dtype={subject.exact_dtype}", *more]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
def test_same_answers_in_any_batch(subject: Subject, size: int, caching: bool) -> None:
    """In any order, with the prefix cache on and off: equal tokens, and log-probs within rounding,
    or bit-equal where the platform declares batch invariance."""
    slack = 0.0 if subject.declared.batch_invariant else subject.slack
    if caching:
        subject.need_prefix_cache()
    wanted = one_by_one(subject, size)
    order = list(range(size))
    random.Random(subject.seed).shuffle(order)
    more = [] if caching else subject.prefix_cache_off
    with subject.engine(*exact(subject, *more)) as engine:
        listed = asks(size) if caching else apart(asks(size))
        found = run(engine, [listed[i] for i in order])
    assert_same(found, [wanted[i] for i in order], slack, f"in a batch of {size}")


def test_bit_equal_answers(subject: Subject, record: Record) -> None:
    """Where batch invariance is declared: full batches in three orders, bit for bit."""
    if not subject.declared.batch_invariant:
        raise NotDeclared("batch_invariant")
    record.feature("batch invariance")
    count = 16
    wanted = one_by_one(subject, count)
    with subject.engine(*exact(subject)) as engine:
        for seed in range(3):
            order = list(range(count))
            random.Random(seed).shuffle(order)
            listed = asks(count)
            found = run(engine, [listed[i] for i in order])
            assert_same(found, [wanted[i] for i in order], 0.0, f"order {seed}")


def test_seeds_survive_the_batch(subject: Subject) -> None:
    """A seeded request draws the same tokens alone and in a batch; another seed draws others."""

    def drawn(seed: int, prompt: list[int]) -> Ask:
        params = SamplingParams(seed=seed, max_tokens=LENGTH, ignore_eos=True, temperature=0.9)
        return Ask(prompt=prompt, params=params)

    listed = [drawn(70 + i, prompt) for i, prompt in enumerate(prompts(6))]
    with subject.engine(*exact(subject)) as engine:
        alone = [run(engine, [one])[0].token_ids for one in listed]
        together = [answer.token_ids for answer in run(engine, listed)]
        again = [answer.token_ids for answer in run(engine, list(reversed(listed)))][::-1]
        other = run(engine, [drawn(500, prompts(1)[0])])[0].token_ids
    assert together == alone, "beside others they draw other tokens"
    assert again == alone, "in another order they draw other tokens"
    assert other != alone[0], "another seed drew the same tokens"
