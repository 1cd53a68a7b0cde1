"""An engine without a model: the next token is a hash of all before it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm_di.components.drafter.none import NoDrafter
from vllm_di.components.engine.standard import StandardEngine
from vllm_di.components.interfaces import Drafter, Executor, Prefix
from vllm_di.components.kv_cache_manager.paged import PagedKvCacheManager
from vllm_di.components.messages import (
    EngineRequest,
    KvGroup,
    KvSpec,
    LimitsReport,
    SampledTokens,
    SamplingParams,
    StepPlan,
    StepResult,
    WorkerReport,
)
from vllm_di.components.scheduler.continuous import ContinuousScheduler
from vllm_di.components.structured_output.none import NoStructuredOutput

VOCAB = 1000
EOS = 999
BLOCK = 4


def report(
    num_blocks: int = 16,
    depth: int = 1,
    windows: tuple[int | None, ...] = (None,),
    max_model_len: int = 48,
    **limits: Any,
) -> WorkerReport:
    """``windows``: one KvGroup for each."""
    return WorkerReport(
        block_size=BLOCK,
        num_blocks=num_blocks,
        bytes_per_block=64,
        kv_groups=[KvGroup([i], window) for i, window in enumerate(windows)],
        kv_specs=[KvSpec(layer=0, num_kv_heads=1, head_size=4)],
        limits=LimitsReport(**limits),
        max_model_len=max_model_len,
        vocab_size=VOCAB,
        eos_token_ids=[EOS],
        device="fake",
        dtype="float32",
        weight_bytes=0,
        depth=depth,
    )


def next_token(token_ids: list[int]) -> int:
    """A function of everything before, so that any lost or doubled token shows."""
    return zlib.crc32(bytes(f"{token_ids}", "ascii")) % VOCAB


def expected(prompt: list[int], params: SamplingParams) -> list[int]:
    """What a request generates when it is alone in the world."""
    ids = list(prompt)
    out: list[int] = []
    while len(out) < (params.max_tokens or 1) and len(ids) < 48:
        token = next_token(ids)
        ids.append(token)
        out.append(token)
        if len(out) >= params.min_tokens and token == EOS and not params.ignore_eos:
            break
    return out


class FakeExecutor(Executor):
    """A worker that keeps its own copy of every sequence and of the cache, and checks the plan
    against them."""

    def __init__(self, the_report: WorkerReport) -> None:
        self.report = the_report
        self.now = 0.0
        """The engine's clock, in seconds."""
        self.seconds: Callable[[StepPlan], float] = lambda plan: 0.0
        """How long a step takes."""
        self.tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[list[int]]] = {}
        """Of each KvGroup."""
        self.slots: dict[int, tuple[int, int]] = {}
        """Slot of the cache to the group, and the hash of all tokens up to the one that was written
        there."""
        self.fail: set[str] = set()
        self.plans: list[StepPlan] = []

    def start(self) -> WorkerReport:
        return self.report

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        self.plans.append(plan)
        self.now += self.seconds(plan)
        for seq_id in plan.finished:
            self.tokens.pop(seq_id, None)
            self.blocks.pop(seq_id, None)
        for new in plan.new:
            assert new.seq_id not in self.tokens
            self.tokens[new.seq_id], self.blocks[new.seq_id] = (
                list(new.token_ids),
                [[] for _ in self.report.kv_groups],
            )
        sampled = []
        for share in plan.scheduled:
            ids, tables = self.tokens[share.seq_id], self.blocks[share.seq_id]
            ids += share.new_tokens
            drafted = ids + share.draft_tokens
            end = share.num_computed + share.num_tokens
            assert share.num_tokens > 0
            assert share.is_prefill == (len(ids) - share.num_computed > 1)
            for index, (blocks, fresh) in enumerate(zip(tables, share.new_blocks, strict=True)):
                blocks += fresh
                assert end <= min(len(drafted), len(blocks) * BLOCK)
                self._run(index, blocks, drafted, share.num_computed, end)
            assert share.samples == (end == len(drafted))
            if share.samples:
                sampled.append(SampledTokens(share.seq_id, _chosen(ids, share.draft_tokens)))
        result = StepResult(plan.step, sampled)
        future: Future[StepResult] = Future()
        future.set_result(result)
        return future

    def _run(self, index: int, blocks: list[int], ids: list[int], start: int, end: int) -> None:
        """One group's layers: what each query sees is in the cache, what runs is written to it."""
        group = self.report.kv_groups[index]
        held = blocks[group.first_block(start, BLOCK) :]
        assert len(set(held)) == len(held) and -1 not in held
        first = 0 if group.window is None else max(0, start - group.window + 1)
        for position in range(first, start):
            assert self.slots[self._slot(blocks, position)] == (index, _mark(ids, position))
        for position in range(start, end):
            self.slots[self._slot(blocks, position)] = (index, _mark(ids, position))

    def collective(self, method: str, *args: Any) -> list[Any]:
        return []

    @staticmethod
    def _slot(blocks: list[int], position: int) -> int:
        return blocks[position // BLOCK] * BLOCK + position % BLOCK


def _chosen(ids: list[int], drafts: list[int]) -> list[int]:
    """The next token, and one more for each draft that proves right."""
    chosen = [next_token(ids)]
    for draft in drafts:
        if draft != chosen[-1]:
            break
        chosen.append(next_token(ids + chosen))
    return chosen


def _mark(ids: list[int], position: int) -> int:
    return hash(tuple(ids[: position + 1]))


class World:
    """An engine on fakes, and what it has put out."""

    def __init__(
        self,
        the_report: WorkerReport,
        *,
        prefix_caching: bool = True,
        drafter: Drafter | None = None,
        **scheduler: Any,
    ) -> None:
        self.kv = PagedKvCacheManager(the_report, prefix_caching=prefix_caching)
        self.num_free = self.kv.num_free_blocks
        settings: dict[str, Any] = {
            "policy": "fcfs",
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_waiting": None,
            "max_step_ms": None,
        }
        self.scheduler = ContinuousScheduler(
            the_report,
            self.kv,
            NoStructuredOutput(),
            drafter or NoDrafter(),
            **(settings | scheduler),
        )
        self.executor = FakeExecutor(the_report)
        self.engine = StandardEngine(self.scheduler, self.kv, self.executor, the_report)
        self.engine.clock = lambda: self.executor.now
        self.out: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}

    def add(self, name: str, prompt: list[int], priority: int = 0, **params: Any) -> EngineRequest:
        request = EngineRequest(
            request_id=name,
            prompt_token_ids=prompt,
            params=SamplingParams(**({"max_tokens": 6} | params)),
            priority=priority,
        )
        self.engine.add(request)
        self.out[name] = []
        return request

    def step(self) -> None:
        for output in self.engine.step().outputs:
            self.out[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                assert output.request_id not in self.reasons
                self.reasons[output.request_id] = output.finish_reason

    def run(self, most: int = 2000) -> None:
        """To the end; a livelock fails."""
        for _ in range(most):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError("the engine never ends")


def cached_tokens(kv: PagedKvCacheManager, prompt: list[int]) -> int:
    found = kv.admit(-1, Prefix(prompt), lambda cached: 1)
    kv.free(-1)
    assert found is not None
    return found[0]
