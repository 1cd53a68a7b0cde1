"""What the choices of a request share crosses to a worker process once."""

from __future__ import annotations

import msgspec
import pytest
from tests.components.scheduler.fakes import World, report

from vllm_di.components.executor.rpc import Call, commands
from vllm_di.components.interfaces import Worker
from vllm_di.components.messages import (
    NewSequence,
    SamplingParams,
    StepInput,
    StepPlan,
)
from vllm_di.components.remote import RemoteMethods

PROMPT = list(range(2000))
BIAS = dict.fromkeys(range(300), 1.5)
WORDS = [[1, 2], [3]]
TEXTS = ["a"]


def choice(seq_id: int, prompt: list[int] = PROMPT, **changes: object) -> NewSequence:
    params = SamplingParams(logit_bias=BIAS, bad_words=TEXTS, seed=seq_id)
    new = NewSequence(
        seq_id=seq_id,
        params=params,
        token_ids=prompt,
        prompt_len=len(PROMPT),
        eos_token_ids=[0],
        bad_words_token_ids=WORDS,
    )
    return msgspec.structs.replace(new, **changes)


def sent(plan: StepPlan) -> tuple[StepPlan, int]:
    """The plan as a worker process receives it, and the bytes that it took."""
    methods = RemoteMethods(Worker)
    frame = Call(methods["execute"]).frame(StepInput(plan.packed()))
    received: StepPlan = commands(methods).decode(frame[4:]).step.plan
    return received, len(frame)


def test_sixteen_choices_take_little_more_than_one() -> None:
    one, many = StepPlan(1, [choice(0)], [], []), StepPlan(1, list(map(choice, range(16))), [], [])
    received, size = sent(many)
    assert received == many
    assert size < 1.5 * sent(one)[1]
    for new in received.new[1:]:
        assert new.token_ids is received.new[0].token_ids
        assert new.params.logit_bias is received.new[0].params.logit_bias
        assert new.bad_words_token_ids is received.new[0].bad_words_token_ids
    assert [new.params.seed for new in received.new] == list(range(16))
    assert all(new.token_ids for new in many.new)  # the engine's own plan is as it was


def test_what_is_not_shared_is_sent_with_each() -> None:
    other = SamplingParams(logit_bias=dict(BIAS), bad_words=["a"])
    plan = StepPlan(
        1,
        [
            choice(0),
            choice(1, [*PROMPT, 7]),  # it goes on after a preemption
            choice(2, params=other),  # equal, of another request
            choice(3),
            choice(4, bad_words_token_ids=[[9]]),
            choice(5, params=SamplingParams()),
            choice(6, params=SamplingParams()),
        ],
        [],
        [5],
    )
    received, _ = sent(plan)
    assert received == plan
    assert received.new[3].token_ids is received.new[0].token_ids
    assert received.new[6].token_ids is received.new[5].token_ids
    assert received.new[2].token_ids is not received.new[0].token_ids


@pytest.mark.parametrize("count", [0, 1])
def test_a_plan_without_choices_is_sent_as_it_is(count: int) -> None:
    plan = StepPlan(1, [choice(0)][:count], [], [])
    assert plan.packed() is plan and sent(plan)[0] == plan


def test_the_scheduler_hands_on_the_objects_that_choices_share() -> None:
    world, prompt, bias = World(report()), [1, 2, 3], {5: 1.0}
    for name in ("a", "b", "c"):
        world.add(name, prompt, logit_bias=bias)
    plan = world.scheduler.schedule()
    assert plan is not None and len(plan.new) == 3
    received, _ = sent(plan)
    assert received == plan
    assert [new.same_as for new in plan.packed().new] == [-1, 0, 0]
    assert plan.new[0].token_ids == prompt
