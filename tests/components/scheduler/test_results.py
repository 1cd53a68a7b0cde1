"""What a step of the workers gives back: failures, results that do not fit, logprobs."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tests.components.scheduler.fakes import VOCAB, World, cached_tokens, expected, report

from vllm_di.components.messages import (
    PromptLogprobs,
    SampledTokens,
    SamplingParams,
    StepResult,
    TokenLogprobs,
)
from vllm_di.errors import EngineDeadError


def test_a_sequence_that_fails_alone_ends_alone() -> None:
    world = World(report(40))
    world.add("bad", [1, 2], max_tokens=4)
    world.add("good", [3, 4], max_tokens=4)
    plan = world.scheduler.schedule()
    assert plan is not None
    result = world.executor.submit(plan).result()
    bad = plan.scheduled[0].seq_id
    kept = [t for t in result.tokens if t.seq_id != bad]
    outputs = world.scheduler.update(plan, StepResult(plan.step, kept, failed={bad: "NaN"}))
    assert {o.request_id: o.finish_reason for o in outputs} == {"bad": "error", "good": None}
    assert next(o for o in outputs if o.request_id == "bad").error == "NaN"
    for output in outputs:
        world.out[output.request_id] += output.token_ids
    world.run()
    assert world.out["good"] == expected([3, 4], SamplingParams(max_tokens=4))
    assert world.kv.num_free_blocks == world.num_free


def test_what_a_failed_sequence_left_is_never_taken_for_a_prefix() -> None:
    """Its blocks may hold anything."""
    world = World(report(40))
    prompt = list(range(9))
    world.add("bad", prompt, max_tokens=4)
    plan = world.scheduler.schedule()
    assert plan is not None
    failed = {plan.scheduled[0].seq_id: "out of memory"}
    world.scheduler.update(plan, StepResult(plan.step, [], failed=failed))
    assert cached_tokens(world.kv, prompt) == 0
    world.add("good", prompt, max_tokens=4)
    world.run()
    assert cached_tokens(world.kv, prompt) > 0


def test_a_result_for_an_aborted_sequence_is_dropped() -> None:
    world = World(report(40))
    world.add("a", [1, 2], max_tokens=4)
    plan = world.scheduler.schedule()
    assert plan is not None
    assert world.scheduler.abort("a")
    assert not world.scheduler.abort("a")
    token = SampledTokens(plan.scheduled[0].seq_id, [5])
    assert world.scheduler.update(plan, StepResult(plan.step, [token])) == []
    assert world.kv.num_free_blocks == world.num_free


def _tokens(*pairs: tuple[int, int]) -> list[SampledTokens]:
    return [SampledTokens(seq_id, [token]) for seq_id, token in pairs]


@pytest.mark.parametrize(
    ("tokens", "more", "words"),
    [
        ([], {}, "gave 0 tokens for sequence 1, not one token"),
        ([(1, 5), (1, 6)], {}, "gave 2 tokens for sequence 1"),
        ([(1, 5), (1, 5)], {}, "gave 2 tokens for sequence 1"),
        ([(1, -1)], {}, r"token -1 for sequence 1, outside the vocabulary \[0, 1000\)"),
        ([(1, VOCAB)], {}, "token 1000 for sequence 1"),
        ([(1, 5)], {"logprobs": 0}, "no log-probabilities for sequence 1"),
        ([(1, 5)], {"prompt_logprobs": 0}, "has 0 prompt log-probabilities of 1"),
    ],
)
def test_a_result_that_does_not_fit_ends_its_sequence_and_no_other(
    tokens: list[tuple[int, int]],
    more: dict[str, Any],
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(report(40))
    world.add("bad", [1, 2], max_tokens=4, **more)
    world.add("good", [3, 4], max_tokens=4)
    plan = world.scheduler.schedule()
    assert plan is not None
    own = [t for t in world.executor.submit(plan).result().tokens if t.seq_id == 2]
    result = StepResult(plan.step, [*_tokens(*tokens), *own])
    outputs = {o.request_id: o for o in world.scheduler.update(plan, result)}
    assert {n: o.finish_reason for n, o in outputs.items()} == {"bad": "error", "good": None}
    assert re.search(words, outputs["bad"].error or "")
    assert outputs["bad"].token_ids == []
    assert re.search(words, caplog.text)
    assert "'bad' ends" in caplog.text
    world.out["good"] += outputs["good"].token_ids
    world.run()
    assert world.out["good"] == expected([3, 4], SamplingParams(max_tokens=4))
    assert world.kv.num_free_blocks == world.num_free


def test_a_token_for_a_prompt_that_goes_on_ends_it() -> None:
    world = World(report(40))
    world.add("long", [1] * 30)
    plan = world.scheduler.schedule()
    assert plan is not None
    assert not plan.scheduled[0].samples
    (output,) = world.scheduler.update(plan, StepResult(plan.step, _tokens((1, 5))))
    assert output.error == "the step gave 1 tokens for sequence 1, not none, its prompt goes on"


def test_prompt_logprobs_come_in_order() -> None:
    world = World(report(40))
    world.add("long", [1] * 30, prompt_logprobs=0)
    plan = world.scheduler.schedule()
    assert plan is not None
    positions = [TokenLogprobs([1], [-1.0], 1)] * 16
    scored = [PromptLogprobs(1, 2, positions)]
    (output,) = world.scheduler.update(plan, StepResult(plan.step, [], scored))
    assert output.error is not None
    assert "go on at position 2, not 1" in output.error


def test_a_result_for_a_sequence_outside_its_step_is_told_and_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(report(40), max_num_seqs=1)
    asked = {n: world.add(n, [p], max_tokens=4) for n, p in (("a", 1), ("b", 2))}
    plan = world.scheduler.schedule()
    assert plan is not None
    result = world.executor.submit(plan).result()
    stray = StepResult(plan.step, [*result.tokens, *_tokens((2, 7))], failed={99: "NaN"})
    (output,) = world.scheduler.update(plan, stray)
    assert "names sequence 2, which had no part in it" in caplog.text
    assert "names sequence 99" in caplog.text
    world.out["a"] += output.token_ids
    world.run()
    for name, request in asked.items():
        assert world.out[name] == expected(request.prompt_token_ids, request.params)


def test_the_result_of_another_step_ends_the_engine() -> None:
    world = World(report(40))
    world.add("a", [1])
    plan = world.scheduler.schedule()
    assert plan is not None
    with pytest.raises(EngineDeadError, match="step 1 was answered with the result of 2"):
        world.scheduler.update(plan, StepResult(2, _tokens((1, 5))))
