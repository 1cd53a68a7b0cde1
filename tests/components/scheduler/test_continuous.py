"""The scheduler, the cache manager and the engine together, on a worker that checks every plan."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.components.scheduler.fakes import (
    BLOCK,
    VOCAB,
    World,
    cached_tokens,
    expected,
    next_token,
    report,
)

from vllm_di.components.interfaces import Drafter
from vllm_di.components.kv_cache_manager import paged
from vllm_di.components.messages import (
    KvGroup,
    SamplingParams,
)
from vllm_di.errors import ConfigError, QueueFullError, RequestError

prompts = st.lists(st.integers(0, 3), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 12)), min_size=1, max_size=10),
    st.integers(12, 40),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([(None,), (5,), (None, 6, 6), (3, 9)]),
    st.integers(0, 3),
    st.sampled_from(
        [
            {},
            {"mixed_steps": False},
            {"mixed_steps": False, "max_prefill_rows": 1},
            {"max_prefill_rows": 1},
            {"max_batch_context": 50},
            {"null_block": True},
        ]
    ),
)
def test_each_request_gets_its_own_tokens(
    wanted: list[tuple[list[int], int]],
    blocks: int,
    depth: int,
    caching: bool,
    windows: tuple[int | None, ...],
    drafts: int,
    limits: dict[str, Any],
) -> None:
    world = World(
        report(blocks * len(windows), depth, windows, **limits),
        prefix_caching=caching,
        drafter=Guesser(drafts),
    )
    asked = {}
    for i, (prompt, count) in enumerate(wanted):
        asked[f"r{i}"] = world.add(f"r{i}", prompt, max_tokens=count)
    world.run()
    for name, request in asked.items():
        assert world.out[name] == expected(request.prompt_token_ids, request.params)
    assert world.kv.num_free_blocks == world.num_free
    for plan in world.executor.plans:
        assert len(plan.scheduled) <= 4
        assert sum(s.num_tokens for s in plan.scheduled) <= 16
        rows = [s.is_prefill for s in plan.scheduled]
        assert rows == sorted(rows)  # decodes first
        if not limits.get("mixed_steps", True):
            started = {new.seq_id for new in plan.new}
            decodes = [s for s in plan.scheduled if s.seq_id not in started and s.new_tokens]
            assert not (decodes and any(rows))
        if limits.get("max_prefill_rows"):
            assert sum(rows) <= 1
            if not limits.get("mixed_steps", True) and plan.new:
                assert len(plan.scheduled) == 1, "a prompt of one token is a row, too"
        if limits.get("null_block"):
            assert all(0 not in blocks for s in plan.scheduled for blocks in s.new_blocks)


def test_prompts_of_one_token_are_rows_where_steps_are_not_mixed() -> None:
    world = World(report(20, 1, (None,), mixed_steps=False, max_prefill_rows=2))
    for number in range(4):
        world.add(f"r{number}", [number], max_tokens=2)
    world.run()
    assert [len(plan.new) for plan in world.executor.plans if plan.new] == [2, 2]


class Guesser(Drafter):
    """Knows what comes next, and errs now and then."""

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        ids = list(token_ids)
        for _ in range(most):
            ids.append(next_token(ids))
        guesses = ids[len(token_ids) :]
        if len(token_ids) % 3 == 0:
            guesses[-1] = (guesses[-1] + 1) % VOCAB
        return guesses


class EngineMachine(RuleBasedStateMachine):
    """Requests come, go and are aborted while steps run in a cache that is too small for all."""

    depth = 1
    windows: tuple[int | None, ...] = (None,)
    drafts = 0

    def __init__(self) -> None:
        super().__init__()
        self.world = World(
            report(14 * len(self.windows), self.depth, self.windows),
            max_waiting=8,
            drafter=Guesser(self.drafts),
        )
        self.asked: dict[str, Any] = {}
        self.count = 0

    @rule(prompt=prompts, tokens=st.integers(1, 10), priority=st.integers(0, 2))
    def add(self, prompt: list[int], tokens: int, priority: int) -> None:
        name = f"r{self.count}"
        try:
            self.asked[name] = self.world.add(name, prompt, priority, max_tokens=tokens)
        except QueueFullError:
            return
        self.count += 1

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        self.world.engine.abort(name)
        if name not in self.world.reasons:
            self.world.reasons[name] = "abort"

    @rule()
    def step(self) -> None:
        self.world.step()

    @rule()
    def forget(self) -> None:
        self.world.engine.reset_prefix_cache()

    @invariant()
    def outputs_are_prefixes_of_what_is_expected(self) -> None:
        for name, request in self.asked.items():
            want = expected(request.prompt_token_ids, request.params)
            got = self.world.out[name]
            assert got == want[: len(got)]
            if self.world.reasons.get(name) not in (None, "abort"):
                assert got == want

    @invariant()
    def blocks_are_counted(self) -> None:
        tables = [t for s in self.world.scheduler._running for t in self.world.kv.block_ids(s)]
        held = {block for table in tables for block in table if block != -1}
        assert self.world.num_free - self.world.kv.num_free_blocks == len(held)

    def teardown(self) -> None:
        self.world.run()
        assert self.world.kv.num_free_blocks == self.world.num_free


EngineMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestEngineMachine = EngineMachine.TestCase


class DeepMachine(EngineMachine):
    """With steps in flight."""

    depth = 2


DeepMachine.TestCase.settings = EngineMachine.TestCase.settings
TestDeepMachine = DeepMachine.TestCase


class WindowMachine(EngineMachine):
    """With layers that see all and layers that see little, and with drafts."""

    windows = (None, 5, 5)
    drafts = 3


WindowMachine.TestCase.settings = EngineMachine.TestCase.settings
TestWindowMachine = WindowMachine.TestCase


def test_a_window_bounds_what_a_sequence_holds() -> None:
    world = World(report(200, windows=(None, 8)), max_num_batched_tokens=16)
    prompt = list(range(40))
    world.add("long", prompt, max_tokens=8, ignore_eos=True)
    most = 0
    while world.engine.has_work():
        world.step()
        for table in world.kv.block_ids(1)[1:]:
            most = max(most, sum(block != -1 for block in table))
    assert world.out["long"] == expected(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
    assert most <= KvGroup([0], 8).most_blocks(48, 16, BLOCK) < 48 // BLOCK


def test_a_prefix_is_found_as_far_as_every_group_has_what_it_sees() -> None:
    world = World(report(40, windows=(None, 6)), max_num_batched_tokens=16)
    prompt = list(range(30))
    world.add("first", prompt, max_tokens=1)
    world.run()
    # all but the last token: 7 blocks, though the window has left most of its own
    assert cached_tokens(world.kv, prompt) == 28
    # behind the window nothing is left that a shorter beginning could end in
    assert cached_tokens(world.kv, prompt[:10] + [99] * 20) in (0, 8)


def test_drafts_that_prove_right_save_steps() -> None:
    params = {"max_tokens": 12, "ignore_eos": True}
    alone, guessed = World(report(40)), World(report(40), drafter=Guesser(3))
    for world in (alone, guessed):
        world.add("a", [1, 2, 3], **params)
        world.run()
    assert guessed.out == alone.out
    assert len(guessed.executor.plans) < len(alone.executor.plans)


def test_a_platform_without_drafts_refuses_a_drafter() -> None:
    with pytest.raises(
        ConfigError, match=r"Guesser needs a platform that checks.*limits\.drafts=false"
    ):
        World(report(40, drafts=False), drafter=Guesser(2))


def test_preemption_recomputes_and_loses_nothing() -> None:
    world = World(report(12))
    for i in range(4):
        world.add(f"r{i}", [i] * 8, max_tokens=20)
    world.run()
    assert world.scheduler.stats().num_preemptions > 0
    for i in range(4):
        assert world.out[f"r{i}"] == expected([i] * 8, SamplingParams(max_tokens=20))


def test_priority_runs_the_important_first_and_preempts_the_others() -> None:
    world = World(report(30), policy="priority", max_num_seqs=1)
    world.add("later", [1], priority=5, max_tokens=2)
    world.add("sooner", [2], priority=1, max_tokens=2)
    world.add("same", [3], priority=1, max_tokens=2)
    world.run()
    assert list(world.reasons) == ["sooner", "same", "later"]


def test_steps_in_flight_share_the_sequences_that_decode() -> None:
    world = World(report(depth=2))
    asked = [world.add(f"r{n}", [n], max_tokens=8) for n in range(4)]
    world.run()
    for n, request in enumerate(asked):
        assert world.out[f"r{n}"] == expected(request.prompt_token_ids, request.params)
    sizes = [len(plan.scheduled) for plan in world.executor.plans]
    assert sizes[0] == 4 and set(sizes[1:]) == {2}
    for one, two in itertools.pairwise(world.executor.plans[1:]):
        assert not {s.seq_id for s in one.scheduled} & {s.seq_id for s in two.scheduled}


def test_a_long_prompt_fills_the_pipeline_by_itself() -> None:
    world = World(report(depth=2))
    request = world.add("long", list(range(40)), max_tokens=2)
    world.step()  # two chunks were submitted before the first was awaited
    assert [p.scheduled[0].num_computed for p in world.executor.plans] == [0, 16]
    world.run()
    assert world.out["long"] == expected(request.prompt_token_ids, request.params)


def test_a_step_in_flight_is_awaited_when_all_requests_are_gone() -> None:
    world = World(report(depth=2))
    world.add("long", list(range(40)))
    world.step()
    world.engine.abort("long")
    assert world.engine.has_work()
    world.run()
    again = world.add("again", [1, 2, 3])
    world.run()
    assert world.out["again"] == expected(again.prompt_token_ids, again.params)
    assert world.out["long"] == []


def test_chunks_of_a_long_prompt_do_not_hold_up_a_decode() -> None:
    world = World(report(40))
    world.add("reader", [1, 2], max_tokens=8)
    world.step()
    world.add("long", [3] * 40, max_tokens=1)
    world.step()
    before = len(world.out["reader"])
    world.step()
    assert len(world.out["reader"]) == before + 1
    assert world.out["long"] == []
    world.run()


def test_equal_beginnings_share_blocks_after_they_are_computed() -> None:
    world = World(report(40))
    world.add("a", [7] * 17, max_tokens=1)
    world.run()
    world.add("b", [7] * 17 + [8], max_tokens=1)
    world.run()
    first, second = world.executor.plans[0].scheduled[0], world.executor.plans[-1].scheduled[0]
    assert second.num_computed == 4 * BLOCK
    assert second.new_blocks[0][:4] == first.new_blocks[0][:4]
    assert world.scheduler.stats().prefix_cache_hits == 16
    world.engine.reset_prefix_cache()
    world.add("c", [7] * 17, max_tokens=1)
    world.run()
    assert world.scheduler.stats().prefix_cache_hits == 16


def test_eos_stop_ids_and_min_tokens() -> None:
    world = World(report(40))
    sequence = expected([5], SamplingParams(max_tokens=12, ignore_eos=True))
    stop = sequence[3]
    first = sequence.index(stop)
    world.add("stop", [5], max_tokens=12, stop_token_ids=[stop])
    later = sequence.index(stop, first) + 1
    world.add("later", [5], max_tokens=12, stop_token_ids=[stop], min_tokens=later + 1)
    world.run()
    assert world.out["stop"] == sequence[: first + 1]
    assert world.reasons["stop"] == "stop"
    assert len(world.out["later"]) > first + 1


class Hashes:
    """Counts what the cache manager hashes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        plain = paged._hash

        def counted(parent: bytes, token_ids: Any) -> bytes:
            self.count += 1
            return plain(parent, token_ids)

        monkeypatch.setattr(paged, "_hash", counted)


def test_a_block_is_hashed_once_a_request_and_a_prompt_is_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head of the queue waits for room, step after step; others are preempted and come back."""
    hashes = Hashes(monkeypatch)
    world = World(report(12), max_num_batched_tokens=48)
    prompts = {f"r{i}": [10 * i + j for j in range(20)] for i in range(4)}
    asked = {n: world.add(n, p, max_tokens=24, ignore_eos=True) for n, p in prompts.items()}
    world.run()
    stats = world.scheduler.stats()
    assert stats.num_preemptions > 0
    assert any(not plan.new for plan in world.executor.plans), "somebody waited"
    for name, request in asked.items():
        assert world.out[name] == expected(request.prompt_token_ids, request.params)
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (80, 0)
    assert hashes.count <= 4 * (44 // BLOCK)


def test_a_cached_prompt_that_waits_is_counted_and_hashed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(report(12), max_num_batched_tokens=48)
    prompt = list(range(17))
    world.add("first", prompt, max_tokens=1)
    world.run()
    world.add("long", [7] * 30, max_tokens=12, ignore_eos=True)
    world.step()
    hashes = Hashes(monkeypatch)
    world.add("again", [*prompt, *range(100, 120)], max_tokens=1)
    for _ in range(5):
        world.step()
        assert world.out["again"] == []
    assert hashes.count <= 5 + 3, "the prompt's blocks, and those that the other one filled"
    before = world.scheduler.stats()
    assert before.prefix_cache_queries == 17 + 30
    world.run()
    stats = world.scheduler.stats()
    assert stats.prefix_cache_queries == 17 + 30 + 37
    assert stats.prefix_cache_hits % BLOCK == 0
    assert world.kv.num_free_blocks == world.num_free


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "empty"),
        ([0] * 48, {}, "48 tokens; the context is 48"),
        ([VOCAB], {}, "outside the vocabulary"),
        ([1], {"stop_token_ids": [-1]}, "stop_token_ids"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
        ([1], {"structured_output": {}}, "structured_output"),
        ([1] * 20, {"max_tokens": 20}, "10 blocks of the KV cache, which has 8"),
    ],
)
def test_what_can_never_run_is_refused(
    prompt: list[int], params: dict[str, Any], words: str
) -> None:
    world = World(report(8))
    with pytest.raises(RequestError, match=words):
        world.add("bad", prompt, **params)
    world.add("good", [1], max_tokens=2)
    with pytest.raises(RequestError, match="in use"):
        world.add("good", [1])
    world.run()
    assert world.kv.num_free_blocks == world.num_free


def test_the_queue_is_bounded() -> None:
    world = World(report(40), max_waiting=2)
    world.add("a", [1])
    world.add("b", [1])
    with pytest.raises(QueueFullError, match="2 requests are waiting") as caught:
        world.add("c", [1])
    assert (caught.value.status, caught.value.retry_after) == (429, 1)
    world.run()
    assert set(world.reasons) == {"a", "b"}


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="whole prompt of 48"):
        World(report(chunked_prefill=False))
    with pytest.raises(ConfigError, match="at least max_num_seqs"):
        World(report(), max_num_batched_tokens=3)
