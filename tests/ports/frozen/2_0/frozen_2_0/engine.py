"""Slots of the engine process: executor, cache manager, scheduler and what stands beside it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from vllm_di.components.interfaces import (
    Drafter,
    Engine,
    Executor,
    KvCacheManager,
    KvTransfer,
    Placement,
    Prefix,
    Scheduler,
    StructuredOutput,
    Worker,
    WorkerLauncher,
)
from vllm_di.components.messages import (
    EngineOutputs,
    EngineRequest,
    EngineStats,
    FinishReason,
    KvGroup,
    LimitsReport,
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    StepInput,
    StepPlan,
    StepResult,
    TokenOutput,
    WorkerReport,
)
from vllm_di.errors import ConfigError, QueueFullError, RequestError


class FrozenExecutor(Executor):
    """One worker in the engine's own process; all layers share a block table."""

    def __init__(self, launcher: WorkerLauncher) -> None:
        self._launcher, self._stack = launcher, ExitStack()
        self._worker: Worker

    def start(self) -> WorkerReport:
        self._worker = self._stack.enter_context(self._launcher.open(Placement()))
        report = self._worker.load()
        groups = [KvGroup([spec.layer for spec in report.kv_specs])]
        size = self._worker.prepare(groups)
        self._worker.allocate(size.num_blocks)
        return msgspec.structs.replace(
            report,
            num_blocks=size.num_blocks,
            bytes_per_block=size.bytes_per_block,
            kv_groups=groups,
        )

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        done: Future[StepResult] = Future()
        done.set_result(self._worker.execute(StepInput(plan)))
        return done

    def collective(self, method: str, *args: Any) -> list[Any]:
        if method not in ("load", "prepare", "allocate", "execute"):
            raise ConfigError(f"executor=frozen_2_0 knows no method {method!r} of its worker")
        return [getattr(self._worker, method)(*args)]

    def close(self) -> None:
        self._stack.close()


class FrozenKvCacheManager(KvCacheManager):
    """Blocks of one group, shared with nobody."""

    def __init__(self, worker_report: WorkerReport, *, prefix_caching: bool) -> None:
        if prefix_caching:
            raise ConfigError("kv_cache_manager.prefix_caching: frozen_2_0 shares no blocks")
        if len(worker_report.kv_groups) != 1:
            raise ConfigError(
                "kv_cache_manager=frozen_2_0 manages one KV group, but the model has "
                f"{len(worker_report.kv_groups)}; choose kv_cache_manager=paged"
            )
        self.num_blocks, self.block_size = worker_report.num_blocks, worker_report.block_size
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._tables: dict[int, list[int]] = {}

    def admit(
        self, seq_id: int, prefix: Prefix, take: Callable[[int], int]
    ) -> tuple[int, int] | None:
        taken = take(0)
        if not taken or -(-taken // self.block_size) > len(self._free):
            return None
        self._tables[seq_id] = []
        self.allocate(seq_id, taken, 0)
        return 0, taken

    def num_missing(self, seq_id: int, num_tokens: int, num_computed: int) -> int:
        wanted = -(-num_tokens // self.block_size) - len(self._tables[seq_id])
        return max(0, wanted - len(self._free))

    def allocate(self, seq_id: int, num_tokens: int, num_computed: int) -> list[list[int]] | None:
        if self.num_missing(seq_id, num_tokens, num_computed):
            return None
        table = self._tables[seq_id]
        wanted = max(0, -(-num_tokens // self.block_size) - len(table))
        added = [self._free.pop() for _ in range(wanted)]
        table += added
        return [added]

    def commit(self, seq_id: int, token_ids: Sequence[int], num_computed: int) -> None: ...

    def free(self, seq_id: int) -> None:
        self._free += reversed(self._tables.pop(seq_id, []))

    def block_ids(self, seq_id: int) -> list[list[int]]:
        return [list(self._tables[seq_id])]

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def reset_prefix_cache(self) -> None: ...

    def stats(self) -> tuple[int, int]:
        return 0, 0


class FrozenKvTransfer(KvTransfer):
    """Between workers of one process."""

    def __init__(self) -> None:
        self._offers: dict[str, bytearray] = {}

    def open(self, session: bytes) -> None: ...

    def offer(self, size: int) -> tuple[str, memoryview]:
        memory = bytearray(size)
        ticket = str(id(memory))
        self._offers[ticket] = memory
        return ticket, memoryview(memory)

    def take(self, ticket: str) -> AbstractContextManager[memoryview]:
        return nullcontext(memoryview(self._offers[ticket]))

    def withdraw(self, ticket: str) -> None:
        self._offers.pop(ticket, None)


class FrozenDrafter(Drafter):
    """Guesses nothing."""

    def __init__(self) -> None: ...

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        return []


class FrozenStructuredOutput(StructuredOutput):
    """Free text alone."""

    def __init__(self) -> None: ...

    def check(self, params: SamplingParams) -> None:
        if params.structured_output is not None:
            raise RequestError(
                "structured output is not available here",
                param="response_format",
                code="unsupported_parameter",
            )


@dataclass(slots=True, eq=False)
class Live:
    """A request, from its arrival to its end."""

    seq_id: int
    request: EngineRequest
    token_ids: list[int]
    max_tokens: int
    queued_at: float
    num_computed: int = 0
    unsent: tuple[int, ...] = ()
    """The token of the step before, for the workers."""
    known: bool = False
    """Whether the workers know it."""
    queue_time: float | None = None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)


class FrozenScheduler(Scheduler):
    """In order of arrival, or of priority first. A request starts when there are blocks for its
    longest answer, so that it always runs to its end."""

    def __init__(
        self,
        kv_cache_manager: KvCacheManager,
        structured_output: StructuredOutput,
        drafter: Drafter,
        worker_report: WorkerReport,
        *,
        policy: Literal["fcfs", "priority"],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting: int,
    ) -> None:
        limits = msgspec.structs.replace(worker_report.limits, drafts=True)
        if limits != LimitsReport():
            raise ConfigError(f"scheduler=frozen_2_0 knows no limits but drafts: got {limits}")
        if drafter.drafts_for(1):
            raise ConfigError("scheduler=frozen_2_0 checks no drafts; set drafter=none")
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError("scheduler.max_num_batched_tokens: below scheduler.max_num_seqs")
        self._kv, self._structured, self._report = (
            kv_cache_manager,
            structured_output,
            worker_report,
        )
        self._max_seqs, self._max_tokens, self._max_waiting = (
            max_num_seqs,
            max_num_batched_tokens,
            max_waiting,
        )
        self._by_priority = policy == "priority"
        self._waiting: deque[Live] = deque()
        self._running: dict[int, Live] = {}
        self._finished: list[int] = []
        self._next_id = self._steps = self._step_tokens = 0

    def add(self, request: EngineRequest) -> None:
        params, report = request.params, self._report
        self._structured.check(params)
        if params.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs are not available here",
                param="prompt_logprobs",
                code="unsupported_parameter",
            )
        room = report.max_model_len - len(request.prompt_token_ids)
        if not request.prompt_token_ids or room < 1:
            raise RequestError(
                f"the prompt must have 1 to {report.max_model_len - 1} tokens",
                param="prompt",
                code="context_length_exceeded" if room < 1 else None,
            )
        for name, ids in (
            ("prompt", request.prompt_token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
            ("bad_words", [i for word in request.bad_words_token_ids for i in word]),
        ):
            if any(not 0 <= i < report.vocab_size for i in ids):
                raise RequestError(f"{name}: no such token id", param=name)
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError("too many requests wait")
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        prompt = list(request.prompt_token_ids)
        if -(-(len(prompt) + max_tokens) // report.block_size) > self._kv.num_blocks:
            raise RequestError("the KV cache is too small for this request", param="max_tokens")
        self._waiting.append(
            Live(self._next_id, request, prompt, max_tokens, queued_at=time.monotonic())
        )
        self._next_id += 1

    def abort(self, request_id: str) -> bool:
        for live in self._waiting:
            if live.request.request_id == request_id:
                self._waiting.remove(live)
                return True
        for live in self._running.values():
            if live.request.request_id == request_id:
                self._end(live)
                return True
        return False

    def _end(self, live: Live) -> None:
        del self._running[live.seq_id]
        self._kv.free(live.seq_id)
        if live.known:
            self._finished.append(live.seq_id)

    def schedule(self) -> StepPlan | None:
        self._admit()
        decoding = [s for s in self._running.values() if len(s.token_ids) - s.num_computed == 1]
        order = decoding + [s for s in self._running.values() if s not in decoding]
        left, new, scheduled = self._max_tokens, [], []
        for live in order:
            count = min(len(live.token_ids) - live.num_computed, left)
            if not count:
                continue
            if not live.known:
                new.append(self._told(live))
            scheduled.append(self._share(live, count))
            live.num_computed += count
            left -= count
        if not scheduled:
            return None
        self._steps, self._step_tokens = self._steps + 1, self._max_tokens - left
        finished, self._finished = self._finished, []
        return StepPlan(self._steps, new, scheduled, finished)

    def _admit(self) -> None:
        if self._by_priority:
            self._waiting = deque(
                sorted(self._waiting, key=lambda s: (s.request.priority, s.seq_id))
            )
        while self._waiting and len(self._running) < self._max_seqs:
            live = self._waiting[0]
            most = len(live.token_ids) + live.max_tokens
            if self._kv.admit(live.seq_id, Prefix(live.token_ids), lambda _, m=most: m) is None:  # type: ignore[misc]
                return
            self._running[live.seq_id] = self._waiting.popleft()
            live.queue_time = time.monotonic() - live.queued_at

    def _told(self, live: Live) -> NewSequence:
        return NewSequence(
            seq_id=live.seq_id,
            params=live.request.params,
            token_ids=list(live.token_ids),
            prompt_len=len(live.request.prompt_token_ids),
            eos_token_ids=self._report.eos_token_ids,
            bad_words_token_ids=live.request.bad_words_token_ids,
        )

    def _share(self, live: Live, count: int) -> ScheduledSequence:
        blocks = [] if live.known else self._kv.block_ids(live.seq_id)
        share = ScheduledSequence(
            seq_id=live.seq_id,
            num_computed=live.num_computed,
            num_tokens=count,
            new_blocks=blocks,
            new_tokens=list(live.unsent),
            samples=live.num_computed + count == len(live.token_ids),
            is_prefill=not live.num_generated,
        )
        live.known, live.unsent = True, ()
        return share

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        found = {token.seq_id: token for token in result.tokens}
        outputs = []
        for share in plan.scheduled:
            live = self._running.get(share.seq_id)
            if live is None:  # aborted meanwhile
                continue
            token = found.get(live.seq_id)
            reason = result.failed.get(live.seq_id)
            if reason is None and share.samples and token is None:
                reason = "the step gave no token"
            if reason is not None:
                self._end(live)
                outputs.append(
                    TokenOutput(
                        request_id=live.request.request_id,
                        finish_reason="error",
                        error=reason,
                        error_status=400 if live.seq_id in result.refused else 500,
                    )
                )
            elif token is not None:
                output = self._taken(live, token.token_ids[0])
                output.logprobs = token.logprobs
                outputs.append(output)
        return outputs

    def _taken(self, live: Live, token: int) -> TokenOutput:
        live.token_ids.append(token)
        live.unsent = (token,)
        reason: FinishReason | None = None
        stop = None
        params = live.request.params
        if live.num_generated >= params.min_tokens:
            if token in self._report.eos_token_ids and not params.ignore_eos:
                reason = "stop"
            elif token in params.stop_token_ids:
                reason, stop = "stop", token
        if reason is None and live.num_generated >= live.max_tokens:
            reason = "length"
        if reason is not None:
            self._end(live)
        queue_time, live.queue_time = live.queue_time or 0.0, None
        return TokenOutput(
            request_id=live.request.request_id,
            token_ids=[token],
            finish_reason=reason,
            stop_reason=stop,
            queue_time=queue_time,
        )

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_cache_usage=1 - self._kv.num_free_blocks / self._kv.num_blocks,
            step_tokens=self._step_tokens,
            num_steps=self._steps,
        )


class FrozenEngine(Engine):
    """One step at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        kv_cache_manager: KvCacheManager,
        executor: Executor,
        worker_report: WorkerReport,
    ) -> None:
        self.report, self.patience = worker_report, executor.patience
        self._scheduler, self._kv, self._executor = scheduler, kv_cache_manager, executor

    def add(self, request: EngineRequest) -> None:
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self._scheduler.has_work()

    def step(self) -> EngineOutputs:
        plan, outputs = self._scheduler.schedule(), []
        if plan is not None:
            outputs = self._scheduler.update(plan, self._executor.submit(plan).result())
        return EngineOutputs(outputs=outputs, stats=self._scheduler.stats())

    def reset_prefix_cache(self) -> None:
        self._kv.reset_prefix_cache()
