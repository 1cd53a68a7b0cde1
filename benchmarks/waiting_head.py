"""``schedule()`` while the head of the queue finds no room: a prompt of 32k tokens, unknown to the
prefix cache or wholly in it.

    python -m benchmarks.waiting_head
"""

from __future__ import annotations

import statistics
import time

from vllm_di.components.drafter.none import NoDrafter
from vllm_di.components.kv_cache_manager.paged import PagedKvCacheManager
from vllm_di.components.messages import (
    EngineRequest,
    KvGroup,
    KvSpec,
    LimitsReport,
    SampledTokens,
    SamplingParams,
    StepResult,
    WorkerReport,
)
from vllm_di.components.scheduler.continuous import ContinuousScheduler
from vllm_di.components.structured_output.none import NoStructuredOutput

PROMPT = 32_768
BLOCK = 32
STEPS = 200


def main() -> None:
    for name, cached in (("unknown to the cache", False), ("wholly in the cache", True)):
        times = [1e3 * seconds for seconds in waiting(cached=cached)]
        print(
            f"head of {PROMPT:,} tokens, {name}: schedule() takes "
            f"{statistics.median(times):.3f} ms (median of {STEPS}, most {max(times):.3f})"
        )


def waiting(*, cached: bool) -> list[float]:
    """Seconds of each ``schedule()`` in which one sequence decodes and the head has no room."""
    report = _report(num_blocks=PROMPT // BLOCK + 16)
    kv = PagedKvCacheManager(report, prefix_caching=True)
    scheduler = ContinuousScheduler(
        report,
        kv,
        NoStructuredOutput(),
        NoDrafter(),
        policy="fcfs",
        max_num_seqs=8,
        max_num_batched_tokens=2 * PROMPT,
        max_waiting=None,
        max_step_ms=None,
    )
    prompt = list(range(PROMPT))
    if cached:
        _add(scheduler, "before", prompt, 1)
        _step(scheduler)
    # the reader holds 7 of the 16 blocks beside the prompt's, later 14; the head needs 15
    _add(scheduler, "reader", [1] * (7 * BLOCK), STEPS + 8)
    _step(scheduler)
    _add(scheduler, "head", [*prompt, *([3] * (15 * BLOCK - 1))], 1)
    _step(scheduler)  # its first look-up hashes
    return [_step(scheduler) for _ in range(STEPS)]


def _step(scheduler: ContinuousScheduler) -> float:
    start = time.perf_counter()
    plan = scheduler.schedule()
    seconds = time.perf_counter() - start
    assert plan is not None
    tokens = [SampledTokens(share.seq_id, [1]) for share in plan.scheduled if share.samples]
    scheduler.update(plan, StepResult(plan.step, tokens))
    return seconds


def _add(scheduler: ContinuousScheduler, name: str, prompt: list[int], count: int) -> None:
    scheduler.add(
        EngineRequest(
            request_id=name,
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=count, ignore_eos=True),
        )
    )


def _report(num_blocks: int) -> WorkerReport:
    return WorkerReport(
        block_size=BLOCK,
        num_blocks=num_blocks,
        bytes_per_block=64,
        kv_groups=[KvGroup([0])],
        kv_specs=[KvSpec(layer=0, num_kv_heads=1, head_size=4)],
        limits=LimitsReport(),
        max_model_len=2 * PROMPT,
        vocab_size=2 * PROMPT,
        eos_token_ids=[],
        device="none",
        dtype="float32",
        weight_bytes=0,
    )


if __name__ == "__main__":
    main()
