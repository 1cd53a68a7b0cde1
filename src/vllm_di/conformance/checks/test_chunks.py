"""A prompt that is computed in chunks, or in a batch with others, gives the same answer."""

from __future__ import annotations

import pytest

from vllm_di.components.messages import LimitsReport
from vllm_di.conformance.compare import assert_same
from vllm_di.conformance.driving import Answer, Ask, apart, ask, prompt_of, run
from vllm_di.conformance.outcomes import NotDeclared
from vllm_di.conformance.subject import Subject
from vllm_di.conformance.tiny import CONTEXT

LENGTHS = (1, 2, 31, 32, 33, 64, 65, 100, 150)


def asks() -> list[Ask]:
    return apart(ask(prompt_of(length), 6, logprobs=5, prompt_logprobs=0) for length in LENGTHS)


def alone(subject: Subject) -> list[Answer]:
    """Each prompt whole and by itself."""

    def make() -> list[Answer]:
        with subject.engine(*exact(subject)) as engine:
            return [run(engine, [one])[0] for one in asks()]

    return subject.once("chunks: whole prompts", make)


def exact(subject: Subject) -> list[str]:
    more = [f"model.dtype={subject.exact_dtype}", *subject.prefix_cache_off]
    return [*more, f"scheduler.max_num_batched_tokens={CONTEXT}"]


@pytest.mark.parametrize("budget", [8, 13, 32, 50])
def test_any_split_of_a_prompt(subject: Subject, budget: int) -> None:
    """Chunks of ``budget`` tokens, shared by all running requests."""
    if not limits(subject).chunked_prefill:
        raise NotDeclared("chunked_prefill")
    more = [*exact(subject), f"scheduler.max_num_batched_tokens={budget}"]
    wanted = alone(subject)
    with subject.engine(*more) as engine:
        each = [run(engine, [one])[0] for one in asks()]
        together = run(engine, asks())
    assert_same(each, wanted, subject.slack, f"in chunks of {budget}")
    assert_same(together, wanted, subject.slack, f"in chunks of {budget}, together")


def test_mixed_batches(subject: Subject) -> None:
    """Prompts that arrive while other requests decode."""
    wanted = alone(subject)
    with subject.engine(*exact(subject)) as engine:
        found = run(engine, asks(), start=lambda index: 2 * index)
    assert_same(found, wanted, subject.slack, "beside decodes")


def limits(subject: Subject) -> LimitsReport:
    with subject.parts("limits") as container:
        found: LimitsReport = container.limits().report()
        return found
