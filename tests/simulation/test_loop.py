"""Events in virtual time, over the real scheduler, cache manager and router."""

from __future__ import annotations

import pytest
from tests.simulation.made_up import (
    BLOCK,
    BLOCK_BYTES,
    DECODE,
    ROW,
    SPLIT,
    TINY,
    load,
    run,
    times,
)

from vllm_di.components.scheduler.continuous import ContinuousScheduler
from vllm_di.simulation.figures import figures
from vllm_di.simulation.fleet import Fleet
from vllm_di.simulation.loop import Outcome

TWO = [*TINY, "executor.data_parallel_size=2", "router=round_robin"]


def test_two_requests_at_once() -> None:
    """Both prompts in one step, then two steps of two decodes."""
    _, found = run(TINY, load(2))
    first = 64 * ROW
    assert list(found.first) == pytest.approx([first, first])
    assert list(found.between) == pytest.approx([DECODE] * 4)
    assert found.seconds == pytest.approx(first + 2 * DECODE)
    assert (found.finished, found.generated_tokens, found.prompt_tokens) == (2, 6, 64)


def test_two_requests_one_after_the_other() -> None:
    _, found = run(TINY, load(2, at_a_time=1))
    each = 32 * ROW + 2 * DECODE
    assert list(found.whole) == pytest.approx([each, each])
    assert found.seconds == pytest.approx(2 * each)


def test_a_request_that_comes_during_a_step_waits_for_its_end() -> None:
    """The one behind an answer comes a moment after it: the other's next step has begun."""
    _, found = run(TINY, load(3, given="32", wanted="3", at_a_time=2))
    begun = 64 * ROW + 2 * DECODE
    # both end together, so that nothing runs when the third comes
    assert list(found.first)[2] == pytest.approx(32 * ROW)
    assert found.seconds == pytest.approx(begun + 32 * ROW + 2 * DECODE)


def test_two_replicas_share_two_requests() -> None:
    fleet, found = run(TWO, load(2))
    assert found.seconds == pytest.approx(32 * ROW + 2 * DECODE)
    assert found.busy == pytest.approx([found.seconds] * 2)
    rows = figures(fleet, found).rows
    assert rows["replicas"] == rows["ranks"] == 2
    assert rows["busy, %: least"] == pytest.approx(100)
    assert rows["generated tokens/s"] == pytest.approx(6 / found.seconds)


def test_a_split_hands_the_cache_over() -> None:
    """A prompt's step on one side, its blocks over the line, then decodes on the other."""
    token = 0.5e-3
    bandwidth = BLOCK_BYTES / BLOCK / token
    fleet, found = run(
        [*SPLIT, "scheduler.max_num_batched_tokens=512"], load(1), bandwidth=bandwidth
    )
    first = 32 * (ROW + token)
    assert list(found.first) == pytest.approx([first])
    assert list(found.between) == pytest.approx([DECODE, DECODE])
    rows = figures(fleet, found).rows
    assert rows["handed over, tokens"] == 32
    assert rows["ranks"] == 2
    assert rows["busy, prefill, %: mean"] == pytest.approx(100 * 32 * ROW / found.seconds)


def test_prompts_run_beside_decodes_in_a_split() -> None:
    """No decode waits for a prompt, whatever comes, where the bandwidth is without end: for a step
    of decodes alone, and a first token's sequence for the step that is under way."""
    mixed = load(40, given="200", wanted="uniform:2,40", at_a_time=6)
    _, together = run(TINY, mixed)
    _, apart = run(
        [*SPLIT, "executor.prefill_replicas=2", "scheduler.max_num_batched_tokens=512"],
        mixed,
        bandwidth=1e15,
    )
    assert max(together.between) > 5 * DECODE
    assert max(apart.between) <= 2.001 * DECODE
    assert apart.seconds < together.seconds


@pytest.mark.parametrize(
    "overrides",
    [
        TINY,
        [*TINY, "executor.data_parallel_size=5"],
        [
            *TINY,
            "executor.data_parallel_size=3",
            "router=least_loaded",
            "scheduler.policy=priority",
        ],
        [*TINY, "worker.num_blocks=140", "scheduler.max_num_seqs=32"],
        [*SPLIT, "executor.prefill_replicas=3", "executor.data_parallel_size=2"],
        [*SPLIT, "worker.num_blocks=140"],
    ],
    ids=["one", "five", "three", "few blocks", "split", "split, few blocks"],
)
def test_every_request_ends_and_every_block_comes_back(overrides: list[str]) -> None:
    workload = load(
        100,
        given="lognormal:100,1.0",
        wanted="lognormal:20,1.0",
        rate=120.0,
        prefixes=4,
        prefix_len=64,
    )
    fleet, found = run(overrides, workload, bandwidth=1e7)
    assert found.finished == 100 and found.refused == 0
    assert len(found.first) == len(found.whole) == len(found.queue) == 100
    assert found.generated_tokens == len(found.first) + len(found.between)
    assert min(found.between) > 0 and min(found.first) > 0 and min(found.queue) >= 0
    for replica in fleet.replicas:
        engine = replica.engine
        assert not engine.has_work()
        assert engine._kv.num_free_blocks == fleet.report.num_blocks
        assert isinstance(engine._scheduler, ContinuousScheduler)
    if any("140" in override for override in overrides):
        assert sum(stats.num_preemptions for stats in found.stats) > 0
    assert all(0 < busy <= found.seconds * (1 + 1e-9) for busy in found.busy)
    hits = figures(fleet, found).rows["prompt tokens from the prefix cache, %"]
    assert 10 < hits < 60


def test_the_same_seed_gives_the_same_figures() -> None:
    overrides = [*TINY, "executor.data_parallel_size=3"]

    def told(seed: int) -> tuple[Fleet, Outcome]:
        return run(
            overrides, load(40, given="uniform:8,300", wanted="8", rate=90.0, prefixes=3, seed=seed)
        )

    one, again, other = (figures(*told(seed)) for seed in (1, 1, 2))
    assert one == again
    assert one.rows != other.rows


def test_a_full_queue_refuses_as_a_server_does() -> None:
    fleet, found = run([*TINY, "scheduler.max_waiting=2"], load(50, rate=1e6))
    assert found.refused > 20 and found.finished + found.refused == 50
    assert any("try again later" in note for note in figures(fleet, found).notes)


def test_requests_beyond_the_context_are_cut_and_told() -> None:
    fleet, found = run(TINY, load(2, given="2040", wanted="500"))
    assert (found.cut, found.generated_tokens) == (2, 16)
    notes = figures(fleet, found).notes
    assert any("2 requests were drawn longer than the context of 2048" in note for note in notes)


def test_steps_beyond_what_was_measured_are_told() -> None:
    few = times()
    few.steps[:] = [step for step in few.steps if step.shape.rows <= 64]
    fleet, found = run(TINY, load(4, given="300", at_a_time=4), measured=few)
    notes = figures(fleet, found).notes
    assert any("up to 64 tokens in a step with prompts" in note for note in notes), notes


def test_the_prefix_router_brings_equal_beginnings_together() -> None:
    """The router is the real one: with caches too small for all beginnings it finds more."""
    workload = load(120, given="16", wanted="4", at_a_time=8, prefixes=12, prefix_len=256, seed=3)
    rates = {}
    for router in ("prefix", "round_robin"):
        fleet, found = run(
            [
                *TINY,
                "executor.data_parallel_size=4",
                f"router={router}",
                "worker.num_blocks=136",
            ],
            workload,
        )
        rates[router] = figures(fleet, found).rows["prompt tokens from the prefix cache, %"]
    assert rates["prefix"] > rates["round_robin"] + 5
