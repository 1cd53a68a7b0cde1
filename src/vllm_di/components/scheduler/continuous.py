"""Continuous batching: each step takes the decoding sequences, then chunks of prompts until the
token budget is full."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Annotated, Literal

import msgspec

from vllm_di.components.interfaces import (
    Drafter,
    KvCacheManager,
    Prefix,
    Scheduler,
    StructuredOutput,
)
from vllm_di.components.messages import (
    EngineRequest,
    EngineStats,
    StepPlan,
    StepResult,
    TokenOutput,
    WorkerReport,
)
from vllm_di.components.scheduler.outputs import error_of, take_tokens, vector_of
from vllm_di.components.scheduler.pace import StepPace
from vllm_di.components.scheduler.queue import WaitingQueue
from vllm_di.components.scheduler.results import misfits, vector_misfits, wants_scores
from vllm_di.components.scheduler.sequence import Sequence
from vllm_di.components.scheduler.step import Step, StepLimits
from vllm_di.components.scheduler.validate import check_settings, validate
from vllm_di.errors import QueueFullError, RequestError


class ContinuousScheduler(Scheduler):
    """One scheduler for every platform; what a platform cannot do is in its ``LimitsReport``."""

    continues = True
    clock: Callable[[], float] = staticmethod(time.monotonic)
    """Seconds, from any beginning."""

    def __init__(
        self,
        worker_report: WorkerReport,
        kv_cache_manager: KvCacheManager,
        structured_output: StructuredOutput,
        drafter: Drafter,
        *,
        policy: Literal["fcfs", "priority"],
        max_num_seqs: Annotated[int, msgspec.Meta(ge=1)],
        max_num_batched_tokens: Annotated[int, msgspec.Meta(ge=1)],
        max_waiting: Annotated[int, msgspec.Meta(ge=1)] | None,
        max_step_ms: Annotated[float, msgspec.Meta(gt=0)] | None,
    ) -> None:
        limits, pooling = worker_report.limits, worker_report.pooling
        self._step_limits = StepLimits(
            platform=limits,
            max_tokens=max_num_batched_tokens,
            block_size=worker_report.block_size,
            chunks_prompts=limits.chunked_prefill and not (pooling and pooling.whole_prompts),
        )
        check_settings(worker_report, drafter, self._step_limits, max_num_seqs, max_step_ms)
        self._report, self._limits, self._kv = worker_report, limits, kv_cache_manager
        self._drafter = drafter
        self._prompts_apart = worker_report.prefill_depth > 0
        self._decodes_in_flight = 0
        """Steps, where prompts run beside them."""
        self._prompts_in_flight: dict[int, set[int]] = {}
        """Step to its sequences, where they run beside decodes."""
        self._depth = 1 if self._prompts_apart else worker_report.depth
        self._structured = structured_output
        self._eos_ids = frozenset(worker_report.eos_token_ids)
        self._max_seqs, self._max_tokens = max_num_seqs, max_num_batched_tokens
        self._max_waiting = max_waiting
        # a decoding sequence has a token in one of ``depth`` steps
        self._pace = StepPace(max_step_ms / 1e3 / self._depth) if max_step_ms else None
        self._after_prompts = False
        self._usable = kv_cache_manager.num_free_blocks
        self._waiting = WaitingQueue(policy)
        self._by_priority = policy == "priority"
        self._running: dict[int, Sequence] = {}
        self._by_request: dict[str, Sequence] = {}
        self._finished: list[int] = []
        self._num_arrived = self._num_preemptions = self._num_steps = self._step_tokens = 0

    # -- requests -----------------------------------------------------------------------------

    def check(self, request: EngineRequest) -> None:
        self._structured.check(request.params)

    def add(self, request: EngineRequest) -> None:
        if request.request_id in self._by_request:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        if self._max_waiting is not None and len(self._waiting) >= self._max_waiting:
            raise QueueFullError(f"{len(self._waiting)} requests are waiting; try again later")
        max_tokens = validate(request, self._report, self._usable, self._max_tokens)
        self._structured.check(request.params)
        self._num_arrived += 1
        token_ids = request.prompt_token_ids
        if generated := request.generated_token_ids:
            token_ids = token_ids + generated
        sequence = Sequence(
            seq_id=self._num_arrived,
            request=request,
            arrival=self._num_arrived,
            max_tokens=max_tokens,
            eos_ids=self._eos_ids,
            queued_at=self.clock(),
            token_ids=token_ids,
            prefix=Prefix(token_ids, request.cache_salt),
            reported=bool(generated),
        )
        self._by_request[request.request_id] = sequence
        self._waiting.push(sequence)

    def abort(self, request_id: str) -> bool:
        sequence = self._by_request.get(request_id)
        if sequence is None:
            return False
        self._forget(sequence)
        return True

    def has_work(self) -> bool:
        return bool(self._by_request)

    # -- one step -----------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        step = self._step_apart() if self._prompts_apart else self._next_step()
        if not step.scheduled:
            return None
        self._after_prompts = step.prefills > 0
        for seq_id, share in step.scheduled.items():
            self._running[seq_id].num_computed = share.num_computed + share.num_tokens
        self._num_steps += 1
        self._step_tokens = step.num_tokens
        if step.is_of_prompts:
            self._prompts_in_flight[self._num_steps] = set(step.scheduled)
        else:
            self._decodes_in_flight += 1
        finished, self._finished = self._finished, []
        shares = list(step.scheduled.values())
        if step.prefills:
            shares.sort(key=lambda s: s.is_prefill)
        return StepPlan(self._num_steps, step.new, shares, finished)

    def _step_apart(self) -> Step:
        """One step of decodes at a time, for all that decode, and steps of prompts beside it."""
        step = Step(self._step_limits, self._max_tokens)
        if not self._decodes_in_flight:
            self._continue_running(step, decodes_alone=True)
        most = self._report.prefill_depth
        if not step.scheduled and len(self._prompts_in_flight) < most and self._can_prefill():
            step.is_of_prompts = True
            self._admit_waiting(step)
        return step

    def _next_step(self) -> Step:
        decodes = 0 if self._pace is None else self._num_decoding()
        step, can_prefill = Step(self._step_limits, self._max_tokens), self._can_prefill()
        if can_prefill:
            self._bound_prompts(step, decodes)
        mixed = self._limits.mixed_steps
        # where prompts and decodes share no step, they take turns
        decodes_turn = not mixed and decodes > 0 and self._after_prompts
        if not mixed and not decodes_turn and can_prefill:
            self._admit_waiting(step)
        if mixed or not step.scheduled:
            self._continue_running(step, decodes_alone=decodes_turn)
            if mixed or not step.scheduled:
                if self._waiting and not can_prefill:  # it was preempted a moment ago
                    self._bound_prompts(step, decodes)
                self._admit_waiting(step)
        return step

    def _bound_prompts(self, step: Step, decodes: int) -> None:
        """By the measured speed: not asked for where no prompt waits, as in most steps."""
        if self._pace is not None and decodes:
            step.prompt_budget = self._pace.prompt_tokens(decodes)

    def timed(self, plan: StepPlan, seconds: float) -> None:
        if self._pace is not None:
            self._pace.observe(plan, seconds)

    def _num_decoding(self) -> int:
        return sum(sequence.is_decoding for sequence in self._running.values())

    def _can_prefill(self) -> bool:
        partial = any(len(s.token_ids) - s.num_computed > 1 for s in self._running.values())
        return bool(self._waiting) or partial

    def _continue_running(self, step: Step, *, decodes_alone: bool) -> None:
        """Give every running sequence its next token, or the next chunk of its prompt."""
        ordered: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self._running.values():
            is_prompt = len(sequence.token_ids) - sequence.num_computed > 1
            (prompts if is_prompt else ordered).append(sequence)
        # decodes before unfinished prompts: a long prompt must not hold up those who read
        if not decodes_alone:
            ordered += prompts
        step.most_drafts = self._drafter.drafts_for(len(ordered))
        most_decodes = len(ordered)
        if self._depth > 1:  # the decoding sequences are split over the steps in flight
            most_decodes = -(-sum(s.is_decoding for s in ordered) // self._depth)
        for sequence in ordered:
            if sequence.seq_id not in self._running:
                continue  # preempted a moment ago, for another one
            remaining = len(sequence.token_ids) - sequence.num_computed
            if remaining <= 0:
                continue  # its last step is still in flight
            if any(sequence.seq_id in ids for ids in self._prompts_in_flight.values()):
                continue  # the last token of a prompt whose other tokens are not there yet
            if len(step.scheduled) >= most_decodes and sequence.is_decoding:
                continue
            count = step.chunk(sequence, remaining)
            if count > 0 and self._make_room(step, sequence, count):
                drafting = step.most_drafts and remaining == 1
                drafts = self._drafts(step, sequence) if drafting else ()
                self._take(step, sequence, count, drafts)

    def _drafts(self, step: Step, sequence: Sequence) -> Collection[int]:
        """Guesses of what follows the sequence's last token, as far as there is room for them."""
        length = len(sequence.token_ids)
        most = min(
            step.most_drafts,
            step.budget - 1,
            sequence.max_tokens - sequence.num_generated - 1,
            self._report.max_model_len - length - 1,
        )
        if most <= 0 or self._kv.num_missing(sequence.seq_id, length + most, sequence.num_computed):
            return []
        if not step.holds_context(length + most):
            return []
        return self._drafter.propose(sequence.token_ids, most)[:most]

    def _admit_waiting(self, step: Step) -> None:
        """Start waiting sequences while there are rows, tokens and blocks."""
        if not self._limits.mixed_steps:
            self._continue_prefills(step)
        while self._waiting and len(self._running) < self._max_seqs and step.budget > 0:
            sequence = self._waiting.first()
            if not step.prefill_allowed():
                return
            admitted = self._admit(step, sequence)
            if admitted is None:
                return
            cached, count = admitted
            self._waiting.pop()
            self._start(step, sequence, cached)
            self._take(step, sequence, count)
            if not self._limits.mixed_steps:  # a prompt of one token has its row here, too
                step.prefills = len(step.scheduled)

    def _continue_prefills(self, step: Step) -> None:
        for sequence in list(self._running.values()):
            remaining = len(sequence.token_ids) - sequence.num_computed
            if sequence.seq_id in self._running and remaining > 1 and step.prefill_allowed():
                count = step.chunk(sequence, remaining)
                if count > 0 and self._make_room(step, sequence, count):
                    self._take(step, sequence, count)

    def _admit(self, step: Step, sequence: Sequence) -> tuple[int, int] | None:
        """Blocks for a waiting sequence: (tokens from the prefix cache, tokens to run now)."""
        # every token of a prompt that is to be scored must run, and all that a pooler reads
        pooling = self._report.pooling
        reads_all = pooling is not None and pooling.every_token
        sequence.prefix.lookup = not reads_all and not wants_scores(sequence)

        def take(cached: int) -> int:
            return step.chunk(sequence, len(sequence.token_ids) - cached)

        return self._kv.admit(sequence.seq_id, sequence.prefix, take)

    def _make_room(self, step: Step, sequence: Sequence, count: int) -> bool:
        """Blocks for ``count`` more tokens, by preempting others; False when it was itself
        preempted."""
        end = sequence.num_computed + count
        while not self._allocate(sequence, end):
            victim = self._victim()
            self._preempt(step, victim)
            if victim is sequence:
                return False
        return True

    def _allocate(self, sequence: Sequence, end: int) -> bool:
        """Blocks for the tokens up to ``end``, to be told to the workers with the next step."""
        fresh = self._kv.allocate(sequence.seq_id, end, sequence.num_computed)
        if fresh is None:
            return False
        if sequence.unsent_blocks:
            for unsent, blocks in zip(sequence.unsent_blocks, fresh, strict=True):
                unsent += blocks
        else:
            sequence.unsent_blocks = fresh
        return True

    def _victim(self) -> Sequence:
        """The last to have come, or the least important of them."""
        if self._by_priority:
            return max(self._running.values(), key=lambda s: s.rank)
        return max(self._running.values(), key=lambda s: s.arrival)

    def _preempt(self, step: Step, sequence: Sequence) -> None:
        """Take all blocks away; it will run again from the start, or from what the cache still
        has."""
        step.withdraw(sequence.seq_id)
        self._kv.free(sequence.seq_id)
        del self._running[sequence.seq_id]
        if sequence.known_to_workers:
            self._finished.append(sequence.seq_id)
        # a new id: results of a step in flight and the workers' old state cannot be mistaken for it
        self._num_arrived += 1
        sequence.seq_id = self._num_arrived
        sequence.known_to_workers = False
        sequence.num_computed = 0
        sequence.unsent_tokens, sequence.unsent_blocks = [], []
        if not sequence.reported:
            sequence.prompt_logprobs = []
        self._num_preemptions += 1
        self._waiting.push_back(sequence)

    def _start(self, step: Step, sequence: Sequence, cached: int) -> None:
        sequence.begin()
        sequence.num_computed = cached
        if sequence.num_cached < 0:
            sequence.num_cached = min(cached, sequence.prompt_len)
            sequence.queue_time = self.clock() - sequence.queued_at
        self._running[sequence.seq_id] = sequence
        step.start(sequence, self._report.eos_token_ids)

    def _take(
        self, step: Step, sequence: Sequence, count: int, drafts: Collection[int] = ()
    ) -> None:
        """Put ``count`` known tokens of a running sequence into the step, and drafts of more."""
        if drafts:
            self._allocate(sequence, sequence.num_computed + count + len(drafts))
        new_blocks, sequence.unsent_blocks = sequence.unsent_blocks, []
        if not sequence.known_to_workers:
            new_blocks = self._kv.block_ids(sequence.seq_id)
        step.take(sequence, count, drafts, new_blocks)
        sequence.unsent_tokens = []
        sequence.known_to_workers = True

    # -- results ------------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        if self._prompts_in_flight.pop(plan.step, None) is None:
            self._decodes_in_flight -= 1
        # sequences aborted or preempted while the step ran are gone, or have another id
        live = {
            share.seq_id: self._running[share.seq_id]
            for share in plan.scheduled
            if share.seq_id in self._running
        }
        if self._report.pooling is not None:
            wrong = vector_misfits(plan, result, live, self._report.pooling.size)
        else:
            wrong = misfits(plan, result, live, self._report.vocab_size)
        failed = wrong | result.failed
        outputs = []
        for share in plan.scheduled:
            sequence = live.get(share.seq_id)
            if sequence is None:
                continue
            if share.seq_id in failed:  # its blocks may hold anything
                status = 400 if share.seq_id in result.refused else 500
                outputs.append(
                    self._end(sequence, error_of(sequence, failed[share.seq_id], status))
                )
                del live[share.seq_id]
                continue
            done = share.num_computed + share.num_tokens - len(share.draft_tokens)
            self._kv.commit(share.seq_id, sequence.token_ids, done)
        for scored in result.prompt_logprobs:
            sequence = live.get(scored.seq_id)
            if sequence is not None and wants_scores(sequence):
                sequence.prompt_logprobs += scored.positions
        if self._report.pooling is not None:
            pooled = [(live[v.seq_id], v.data) for v in result.vectors if v.seq_id in live]
            return outputs + [self._end(seq, vector_of(seq, data)) for seq, data in pooled]
        drafts = {s.seq_id: len(s.draft_tokens) for s in plan.scheduled if s.draft_tokens}
        for sampled in result.tokens:
            sequence = live.get(sampled.seq_id)
            if sequence is not None:
                if drafts:  # wrong drafts ran but do not count as computed
                    num_right = len(sampled.token_ids) - 1
                    sequence.num_computed -= drafts.get(sampled.seq_id, 0) - num_right
                output = take_tokens(sequence, sampled, self._report.max_model_len)
                outputs.append(self._end(sequence, output))
        return outputs

    def _end(self, sequence: Sequence, output: TokenOutput) -> TokenOutput:
        """``output``; after the last one the sequence is forgotten."""
        if output.finish_reason is not None:
            self._forget(sequence)
        return output

    def _forget(self, sequence: Sequence) -> None:
        """Whatever phase it is in: no block, row or queue place of it is left."""
        del self._by_request[sequence.request.request_id]
        self._kv.free(sequence.seq_id)
        if self._running.pop(sequence.seq_id, None) is None:
            self._waiting.remove(sequence)
        elif sequence.known_to_workers:
            self._finished.append(sequence.seq_id)

    def stats(self) -> EngineStats:
        queries, hits = self._kv.stats()
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_cache_usage=1 - self._kv.num_free_blocks / self._usable,
            num_preemptions=self._num_preemptions,
            prefix_cache_queries=queries,
            prefix_cache_hits=hits,
            step_tokens=self._step_tokens,
            num_steps=self._num_steps,
        )
