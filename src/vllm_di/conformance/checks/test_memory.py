"""All blocks in use, more memory asked for than there is, and out of memory in the middle of a
step."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch

from vllm_di.components.interfaces import Sampler
from vllm_di.conformance import probes
from vllm_di.conformance.compare import assert_same
from vllm_di.conformance.driving import Answer, ask, run
from vllm_di.conformance.golden import prompts
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.subject import Subject
from vllm_di.errors import ConfigError

SECONDS = {"short": 3.0, "full": 600.0}


def test_full_cache(subject: Subject, record: Record) -> None:
    """More requests than blocks, for 3 s (10 minutes in the full form): nothing fails."""
    with subject.parts("kv_layout", "model") as container:
        per_sequence = -(-container.model().max_model_len // container.kv_layout().block_size)
    with subject.engine(f"worker.num_blocks={2 * per_sequence + 1}") as engine:
        usage: list[float] = []
        length = engine.report.max_model_len - 20
        asks = [ask([(i + n) % 250 for i in range(length)], 16) for n in range(4)]
        rounds, deadline = 0, time.monotonic() + SECONDS[subject.form]
        while time.monotonic() < deadline or not rounds:
            for answer in run(engine, asks, watch=lambda s: usage.append(s.kv_cache_usage)):
                assert answer.error is None, answer.error
            rounds += 1
        left = engine.step().stats.kv_cache_usage
    record.figure(rounds=rounds, peak_usage=max(usage))
    assert max(usage) > 0.7, f"the cache was never full: {max(usage):.0%}"
    assert left == 0, f"{left:.0%} of the blocks never came back"


def test_too_much_is_refused_at_the_start(subject: Subject) -> None:
    """With both sizes in the error: what was asked for, and what is free."""
    subject.need_driver()
    more = [f"worker.num_blocks={2**40}"]
    with pytest.raises(ConfigError) as error, subject.engine(*more):
        pass
    assert len(re.findall(r"\d+", str(error.value))) >= 2, f"no figures: {error.value}"
    with pytest.raises(ConfigError) as error, subject.engine("worker.num_blocks=1"):
        pass
    assert "num_blocks" in str(error.value), f"does not name the key: {error.value}"


class OutOfMemory(Sampler):
    """Passes calls on to another sampler, except in the step that is to fail."""

    def __init__(self, inner: Sampler) -> None:
        self._inner, self.fail = inner, False

    def sample(self, logits: torch.Tensor, rows: Any) -> Any:
        if self.fail:
            self.fail = False
            raise torch.OutOfMemoryError(f"injected into {len(rows)}")
        return self._inner.sample(logits, rows)


def survivors(answers: list[Answer]) -> list[int]:
    """The places of the requests that were not in the step that failed: a platform may prefill
    one prompt at a time. All that were in it, and no others, got its error."""
    hit = [i for i, one in enumerate(answers) if one.error is not None]
    counts = {re.search(r"injected into (\d+)", str(answers[i].error)) for i in hit}
    told = [int(found[1]) if found else 0 for found in counts]
    assert hit and told == [len(hit)] * len(told), [one.error for one in answers]
    assert all(answers[i].finish_reason == "error" for i in hit)
    return [i for i in range(len(answers)) if i not in hit]


@pytest.mark.parametrize("step", [0, 3])
def test_out_of_memory_in_the_model(subject: Subject, step: int) -> None:
    """In a prefill and in a decode: what the failed step did not write is never taken from the
    prefix cache."""
    if len(subject.stages) > 1:
        raise NotDeclared("stages in the middle of a step wait for each other")
    asks = [ask([(7 * i + n) % 250 for i in range(90)], 6, logprobs=20) for n in range(3)]
    starved = probes.name_of("Starved", subject.target("program"))
    exact = f"model.dtype={subject.exact_dtype}"
    with subject.engine(exact) as engine:
        wanted = run(engine, asks)
    with subject.engine(exact, f"program._target_={starved}") as engine:
        probes.STARVED[:] = [step]
        failed = run(engine, asks)
        assert not probes.STARVED, "the program was not called"
        again = run(engine, asks)
        assert engine.step().stats.kv_cache_usage == 0
    rest = survivors(failed)
    assert_same([failed[i] for i in rest], [wanted[i] for i in rest], subject.slack, "beside it")
    assert_same(again, wanted, subject.slack, "after a step that ran out of memory")


def test_out_of_memory_ends_one_step(subject: Subject) -> None:
    """The requests of that step get an error, the engine runs on."""
    with subject.parts("sampler") as container:
        faulty = OutOfMemory(container.sampler())
        asks = [ask(prompt, 6) for prompt in prompts(3)]
        with subject.engine(worker={"sampler": faulty}) as engine:
            wanted = run(engine, asks)

            def fail_in(step: int) -> None:
                faulty.fail = faulty.fail or step == 2

            failed = run(engine, asks, each_step=fail_in)
            again = run(engine, asks)
            assert engine.step().stats.kv_cache_usage == 0
    rest = survivors(failed)
    assert [failed[i].token_ids for i in rest] == [wanted[i].token_ids for i in rest]
    assert [a.token_ids for a in again] == [a.token_ids for a in wanted]
