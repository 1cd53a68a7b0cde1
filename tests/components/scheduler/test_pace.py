"""Steps that carry decodes stay within a bound, on a clock that the worker turns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.components.scheduler.fakes import BLOCK, World, expected, report

from vllm_di.components.messages import StepPlan
from vllm_di.components.scheduler.pace import LEAST_CHUNK, StepPace
from vllm_di.errors import VllmDiError

MS = 1e-3


def machine(
    *, fixed: float = 5, decode: float = 0.5, token: float = 1.0, context: float = 0.0
) -> Callable[[StepPlan], float]:
    """A worker's time for a step, from milliseconds: each step, decode, prompt token, and 100 of
    the tokens that a prompt token sees."""

    def seconds(plan: StepPlan) -> float:
        prompts = [s for s in plan.scheduled if s.is_prefill]
        seen = sum(s.num_tokens * (s.num_computed + s.num_tokens / 2) for s in prompts)
        return MS * (
            fixed
            + decode * (len(plan.scheduled) - len(prompts))
            + token * sum(s.num_tokens for s in prompts)
            + context * seen / 100
        )

    return seconds


def world(bound: float | None, seconds: Callable[[StepPlan], float], **limits: Any) -> World:
    """Four readers that decode alone for a while, on a worker of that speed."""
    made = World(
        report(3000, max_model_len=2000, **limits),
        max_num_seqs=32,
        max_num_batched_tokens=512,
        max_step_ms=bound,
    )
    made.executor.seconds = seconds
    for number in range(4):
        made.add(f"reader{number}", [number] * 40, max_tokens=1500, ignore_eos=True)
    for _ in range(12):
        made.step()
    made.executor.plans.clear()
    return made


def burst(made: World, count: int = 16, length: int = 300) -> None:
    for number in range(count):
        made.add(f"late{number}", [10 + number] * length, max_tokens=4)


def until_first_tokens(made: World) -> None:
    for _ in range(3000):
        if all(tokens for tokens in made.out.values()):
            return
        made.step()
    raise AssertionError("a prompt never came to its end")


def mixed(made: World) -> list[StepPlan]:
    return [p for p in made.executor.plans if any(s.is_prefill for s in p.scheduled)]


def prompt_tokens(plan: StepPlan) -> int:
    return sum(s.num_tokens for s in plan.scheduled if s.is_prefill)


@pytest.mark.parametrize("context", [0.0, 0.03])
@pytest.mark.parametrize("token", [0.2, 1.0, 3.0])
def test_a_burst_holds_no_reader_beyond_the_bound(token: float, context: float) -> None:
    seconds = machine(token=token, context=context * token)
    made = world(100, seconds)
    burst(made, count=6, length=1000)
    until_first_tokens(made)
    took = [seconds(plan) for plan in mixed(made)]
    assert max(took) <= 0.120, "the estimate follows the contexts by a few steps"
    # and the time is used: but for the chunks that end a prompt or its last block
    full = [s for s, plan in zip(took, mixed(made), strict=True) if prompt_tokens(plan) < 512]
    assert sorted(full)[len(full) // 2] >= 0.080


def test_without_a_bound_a_burst_fills_each_step() -> None:
    made = world(None, machine())
    burst(made)
    until_first_tokens(made)
    assert prompt_tokens(mixed(made)[0]) == 508


def test_a_prompt_alone_is_not_cut() -> None:
    made = World(report(3000, max_model_len=2000), max_num_batched_tokens=512, max_step_ms=20)
    made.executor.seconds = machine()
    made.add("one", [1] * 500, max_tokens=2)
    made.add("two", [2] * 300, max_tokens=2)
    made.step()
    assert prompt_tokens(made.executor.plans[0]) == 512


def test_slow_decodes_leave_prompts_as_long_as_they_take() -> None:
    """Decodes that take longer than the bound must not stop the prompts."""
    seconds = machine(fixed=300, token=1.0)
    made = world(100, seconds)
    burst(made, count=4)
    until_first_tokens(made)
    most = max(prompt_tokens(plan) for plan in mixed(made))
    assert 200 <= most <= 400


def test_the_least_chunk_is_kept_however_slow_prompts_are() -> None:
    made = world(10, machine(fixed=1, decode=0.1, token=50))
    burst(made, count=1, length=100)
    until_first_tokens(made)
    assert [prompt_tokens(plan) for plan in mixed(made)][:6] == [LEAST_CHUNK] * 6


def test_it_follows_a_machine_that_becomes_slow_and_quick_again() -> None:
    made = world(100, machine(token=0.5))
    burst(made, count=12, length=1500)

    def chunk() -> int:
        for _ in range(12):
            made.step()
        return max(prompt_tokens(plan) for plan in made.executor.plans[-3:])

    quick = chunk()
    made.executor.seconds = machine(token=2.0)
    slow = chunk()
    made.executor.seconds = machine(token=0.5)
    again = chunk()
    assert 150 <= quick <= 200 and 30 <= slow <= 50 and 150 <= again <= 200


def test_the_pace_is_asked_for_where_a_prompt_waits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its medians cost as much as the rest of a small step."""
    made, asked = world(50, machine()), list[int]()
    paced = StepPace.prompt_tokens

    def counted(pace: StepPace, decodes: int) -> int:
        asked.append(decodes)
        return paced(pace, decodes)

    monkeypatch.setattr(StepPace, "prompt_tokens", counted)
    for _ in range(20):
        made.step()
    assert asked == []
    burst(made, 2)
    until_first_tokens(made)
    assert len(asked) == len(mixed(made)) > 2


def test_a_disturbed_step_changes_nothing() -> None:
    """One step in seven takes twenty times as long: another process had the machine."""
    steady, calls = machine(token=0.5), iter(range(10**6))
    made = world(100, lambda plan: steady(plan) * (20 if next(calls) % 7 == 0 else 1))
    burst(made, count=12, length=1500)
    for _ in range(40):
        made.step()
    chunks = [prompt_tokens(plan) for plan in mixed(made)[8:]]
    assert min(chunks) >= 140 and max(chunks) <= 240


def test_chunks_end_with_a_block() -> None:
    made = world(60, machine(token=1.0))
    burst(made, count=1, length=301)
    until_first_tokens(made)
    ends = [s.num_computed + s.num_tokens for p in mixed(made) for s in p.scheduled if s.is_prefill]
    assert len(ends) > 3 and all(end % BLOCK == 0 for end in ends[:-1]) and ends[-1] == 301


def test_tokens_from_the_prefix_cache_take_no_time_of_the_bound() -> None:
    made = world(100, machine())
    made.add("first", [7] * 1000, max_tokens=1)
    until_first_tokens(made)
    made.executor.plans.clear()
    made.add("second", [7] * 1000 + [8] * 20, max_tokens=1)
    made.step()
    (share,) = [s for s in made.executor.plans[-1].scheduled if s.is_prefill]
    assert (share.num_computed, share.num_tokens) == (1000, 20)


def test_where_steps_are_not_mixed_prompts_and_decodes_take_turns() -> None:
    seconds = machine(token=1.0)
    made = world(100, seconds, mixed_steps=False, max_prefill_rows=1)
    burst(made, count=3)
    until_first_tokens(made)
    kinds = [prompt_tokens(plan) > 0 for plan in made.executor.plans]
    assert (True, True) not in list(itertools.pairwise(kinds))
    for first, then in itertools.pairwise(made.executor.plans):
        assert seconds(first) + seconds(then) <= 0.120


def test_whole_prompts_go_one_at_a_time() -> None:
    """A platform without chunks of prompts."""
    made = World(
        report(6000, max_model_len=500, chunked_prefill=False),
        max_num_seqs=32,
        max_num_batched_tokens=1000,
        max_step_ms=50,
    )
    made.executor.seconds = machine(token=1.0)
    made.add("reader", [1] * 40, max_tokens=400, ignore_eos=True)
    for _ in range(12):
        made.step()
    made.executor.plans.clear()
    burst(made, count=5, length=300)
    until_first_tokens(made)
    assert [prompt_tokens(plan) for plan in mixed(made)] == [300] * 5


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 12)),
        min_size=1,
        max_size=10,
    ),
    st.integers(12, 40),
    st.integers(1, 3),
    st.sampled_from(
        [
            {},
            {"mixed_steps": False},
            {"mixed_steps": False, "max_prefill_rows": 1},
            {"max_batch_context": 50},
        ]
    ),
    st.integers(0, 10**6),
)
def test_tokens_are_the_same_whatever_the_times(
    wanted: list[tuple[list[int], int]],
    blocks: int,
    depth: int,
    limits: dict[str, Any],
    seed: int,
) -> None:
    """Preemption, prefix cache, steps in flight: the worker checks each plan."""
    made, draw = World(report(blocks, depth, **limits), max_step_ms=10), random.Random(seed)
    made.executor.seconds = lambda plan: draw.choice([0.0, 0.001, 0.02, 5.0])
    asked = {
        f"r{i}": made.add(f"r{i}", prompt, max_tokens=count)
        for i, (prompt, count) in enumerate(wanted)
    }
    made.run()
    for name, request in asked.items():
        assert made.out[name] == expected(request.prompt_token_ids, request.params)
    assert made.kv.num_free_blocks == made.num_free


def test_a_bound_of_nothing_is_refused() -> None:
    from vllm_di import LLM

    with pytest.raises(VllmDiError, match=r"scheduler\.max_step_ms"):
        LLM("tiny", overrides=["scheduler.max_step_ms=0"])
