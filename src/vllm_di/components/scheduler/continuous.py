"""Continuous batching: each step takes the decoding sequences, then chunks of prompts until the
token budget is full."""

from __future__ import annotations

import time
from collections.abc import Collection
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
    NewSequence,
    SampledTokens,
    ScheduledSequence,
    StepPlan,
    StepResult,
    TokenOutput,
    WorkerReport,
)
from vllm_di.components.scheduler.pace import StepPace
from vllm_di.components.scheduler.queue import WaitingQueue
from vllm_di.components.scheduler.results import misfits, vector_misfits, wants_scores
from vllm_di.components.scheduler.sequence import Sequence
from vllm_di.components.scheduler.validate import validate
from vllm_di.errors import ConfigError, QueueFullError, RequestError

PROMPT_LOGPROBS_CHUNK = 256
"""Prompt tokens of a step for a request that wants prompt log-probabilities: each needs a row of
logits."""


class _Step:
    """A step in the making."""

    def __init__(self, budget: int, prompt_budget: int) -> None:
        self.budget = budget
        self.prompt_budget = prompt_budget
        """Of the budget, what prompts may take."""
        self.is_of_prompts = False
        """Whether it runs beside a step of decodes."""
        self.context = 0
        self.prefills = 0
        self.most_drafts = 0
        self.new: list[NewSequence] = []
        self.scheduled: dict[int, ScheduledSequence] = {}


class ContinuousScheduler(Scheduler):
    """One scheduler for every platform; what a platform cannot do is in its ``LimitsReport``."""

    continues = True

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
        self._chunks_prompts = limits.chunked_prefill and not (pooling and pooling.whole_prompts)
        if not self._chunks_prompts and max_num_batched_tokens < worker_report.max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must hold a whole prompt of "
                f"{worker_report.max_model_len} tokens on a platform without chunked prefill, and "
                "of a model whose tokens see those behind them"
            )
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({max_num_seqs}): each decoding sequence takes one token"
            )
        if drafter.max_drafts and not limits.drafts:
            raise ConfigError(
                f"{type(drafter).__name__} needs a platform that checks several tokens of a "
                "sequence in a step, and this one has limits.drafts=false; take drafter=none",
                key="drafter",
            )
        if worker_report.prefill_depth and max_step_ms is not None:
            raise ConfigError(
                f"max_step_ms ({max_step_ms:g}) bounds steps that prompts share with decodes, and "
                "here they run on workers of their own; set it to null"
            )
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
            queued_at=time.monotonic(),
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
        self._step_tokens = self._max_tokens - step.budget
        if step.is_of_prompts:
            self._prompts_in_flight[self._num_steps] = set(step.scheduled)
        else:
            self._decodes_in_flight += 1
        finished, self._finished = self._finished, []
        shares = list(step.scheduled.values())
        if step.prefills:
            shares.sort(key=lambda s: s.is_prefill)
        return StepPlan(self._num_steps, step.new, shares, finished)

    def _step_apart(self) -> _Step:
        """One step of decodes at a time, for all that decode, and steps of prompts beside it."""
        step = _Step(self._max_tokens, self._max_tokens)
        if not self._decodes_in_flight:
            self._continue_running(step, decodes_alone=True)
        most = self._report.prefill_depth
        if not step.scheduled and len(self._prompts_in_flight) < most and self._can_prefill():
            step.is_of_prompts = True
            self._admit_waiting(step)
        return step

    def _next_step(self) -> _Step:
        decodes = 0 if self._pace is None else self._num_decoding()
        prompt_budget = self._max_tokens
        if self._pace is not None and decodes:
            prompt_budget = self._pace.prompt_tokens(decodes)
        step = _Step(self._max_tokens, prompt_budget)
        mixed = self._limits.mixed_steps
        # where prompts and decodes share no step, they take turns
        decodes_turn = not mixed and decodes > 0 and self._after_prompts
        if not mixed and not decodes_turn and self._can_prefill():
            self._admit_waiting(step)
        if mixed or not step.scheduled:
            self._continue_running(step, decodes_alone=decodes_turn)
            if mixed or not step.scheduled:
                self._admit_waiting(step)
        return step

    def timed(self, plan: StepPlan, seconds: float) -> None:
        if self._pace is not None:
            self._pace.observe(plan, seconds)

    def _num_decoding(self) -> int:
        return sum(sequence.is_decoding for sequence in self._running.values())

    def _can_prefill(self) -> bool:
        partial = any(len(s.token_ids) - s.num_computed > 1 for s in self._running.values())
        return bool(self._waiting) or partial

    def _continue_running(self, step: _Step, *, decodes_alone: bool) -> None:
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
            count = self._chunk(step, sequence, remaining)
            if count > 0 and self._make_room(step, sequence, count):
                drafting = step.most_drafts and remaining == 1
                drafts = self._drafts(step, sequence) if drafting else ()
                self._take(step, sequence, count, drafts)

    def _drafts(self, step: _Step, sequence: Sequence) -> Collection[int]:
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
        context = self._limits.max_batch_context
        if context is not None and step.context + length + most > context:
            return []
        return self._drafter.propose(sequence.token_ids, most)[:most]

    def _admit_waiting(self, step: _Step) -> None:
        """Start waiting sequences while there are rows, tokens and blocks."""
        if not self._limits.mixed_steps:
            self._continue_prefills(step)
        while self._waiting and len(self._running) < self._max_seqs and step.budget > 0:
            sequence = self._waiting.first()
            if not self._prefill_allowed(step):
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

    def _continue_prefills(self, step: _Step) -> None:
        for sequence in list(self._running.values()):
            remaining = len(sequence.token_ids) - sequence.num_computed
            if sequence.seq_id in self._running and remaining > 1 and self._prefill_allowed(step):
                count = self._chunk(step, sequence, remaining)
                if count > 0 and self._make_room(step, sequence, count):
                    self._take(step, sequence, count)

    def _prefill_allowed(self, step: _Step) -> bool:
        most = self._limits.max_prefill_rows
        return most is None or step.prefills < most

    def _admit(self, step: _Step, sequence: Sequence) -> tuple[int, int] | None:
        """Blocks for a waiting sequence: (tokens from the prefix cache, tokens to run now)."""
        # every token of a prompt that is to be scored must run, and all that a pooler reads
        pooling = self._report.pooling
        reads_all = pooling is not None and pooling.every_token
        sequence.prefix.lookup = not reads_all and not wants_scores(sequence)

        def take(cached: int) -> int:
            return self._chunk(step, sequence, len(sequence.token_ids) - cached)

        return self._kv.admit(sequence.seq_id, sequence.prefix, take)

    def _chunk(self, step: _Step, sequence: Sequence, remaining: int) -> int:
        """How many of the remaining tokens may run in this step."""
        count = min(remaining, step.budget)
        if remaining > 1:
            if not self._prefill_allowed(step):
                return 0
            if sequence.request.params.prompt_logprobs is not None:
                count = min(count, PROMPT_LOGPROBS_CHUNK)
            count = min(count, self._prompt_share(step, sequence, remaining))
            if count < remaining and not self._chunks_prompts:
                return 0
        most = self._limits.max_batch_context
        if most is not None and step.scheduled:
            context = len(sequence.token_ids) - remaining + count
            if step.context + context > most:
                return 0
        return count

    def _prompt_share(self, step: _Step, sequence: Sequence, remaining: int) -> int:
        """What the prompts' budget leaves of a prompt's ``remaining`` tokens: all, or as many as
        end with a block, where that is any."""
        if remaining <= step.prompt_budget:
            return remaining
        if not self._chunks_prompts:  # one at a time, however long it is
            return 0 if step.prefills else remaining
        start = len(sequence.token_ids) - remaining
        beyond = (start + step.prompt_budget) % self._report.block_size
        return step.prompt_budget - beyond if beyond < step.prompt_budget else step.prompt_budget

    def _make_room(self, step: _Step, sequence: Sequence, count: int) -> bool:
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

    def _preempt(self, step: _Step, sequence: Sequence) -> None:
        """Take all blocks away; it will run again from the start, or from what the cache still
        has."""
        share = step.scheduled.pop(sequence.seq_id, None)
        if share is not None:
            step.budget += share.num_tokens
            step.prompt_budget += share.num_tokens if share.is_prefill else 0
            step.context -= share.num_computed + share.num_tokens
            step.new = [n for n in step.new if n.seq_id != sequence.seq_id]
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

    def _start(self, step: _Step, sequence: Sequence, cached: int) -> None:
        sequence.begin()
        sequence.num_computed = cached
        if sequence.num_cached < 0:
            sequence.num_cached = min(cached, sequence.prompt_len)
            sequence.queue_time = time.monotonic() - sequence.queued_at
        self._running[sequence.seq_id] = sequence
        step.new.append(
            NewSequence(
                seq_id=sequence.seq_id,
                params=sequence.request.params,
                token_ids=_known_tokens(sequence),
                prompt_len=sequence.prompt_len,
                eos_token_ids=self._report.eos_token_ids,
                bad_words_token_ids=sequence.request.bad_words_token_ids,
            )
        )

    def _take(
        self, step: _Step, sequence: Sequence, count: int, drafts: Collection[int] = ()
    ) -> None:
        """Put ``count`` known tokens of a running sequence into the step, and drafts of more."""
        end = sequence.num_computed + count
        samples = end == len(sequence.token_ids)
        count, end = count + len(drafts), end + len(drafts)
        if drafts:
            self._allocate(sequence, end)
        new_blocks, sequence.unsent_blocks = sequence.unsent_blocks, []
        if not sequence.known_to_workers:
            new_blocks = self._kv.block_ids(sequence.seq_id)
        is_prefill = len(sequence.token_ids) - sequence.num_computed > 1
        step.scheduled[sequence.seq_id] = ScheduledSequence(
            seq_id=sequence.seq_id,
            num_computed=sequence.num_computed,
            num_tokens=count,
            new_blocks=new_blocks,
            new_tokens=sequence.unsent_tokens,
            samples=samples,
            is_prefill=is_prefill,
            draft_tokens=list(drafts),
        )
        sequence.unsent_tokens = []
        sequence.known_to_workers = True
        step.budget -= count
        step.prompt_budget -= count if is_prefill else 0
        step.context += end
        step.prefills += is_prefill

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
                outputs.append(self._fail(sequence, failed[share.seq_id], status))
                del live[share.seq_id]
                continue
            done = share.num_computed + share.num_tokens - len(share.draft_tokens)
            self._kv.commit(share.seq_id, sequence.token_ids, done)
        for scored in result.prompt_logprobs:
            sequence = live.get(scored.seq_id)
            if sequence is not None and wants_scores(sequence):
                sequence.prompt_logprobs += scored.positions
        if self._report.pooling is not None:
            return outputs + self._pooled(result, live)
        drafts = {s.seq_id: len(s.draft_tokens) for s in plan.scheduled if s.draft_tokens}
        for sampled in result.tokens:
            sequence = live.get(sampled.seq_id)
            if sequence is not None:
                if drafts:  # wrong drafts ran but do not count as computed
                    num_right = len(sampled.token_ids) - 1
                    sequence.num_computed -= drafts.get(sampled.seq_id, 0) - num_right
                outputs.append(self._append(sequence, sampled))
        return outputs

    def _fail(self, sequence: Sequence, reason: str, status: int) -> TokenOutput:
        output = self._output(sequence, [])
        output.finish_reason, output.error, output.error_status = "error", reason, status
        if status == 400:
            params = sequence.request.params
            masks = ("allowed_token_ids", "bad_words", "min_tokens")
            output.error_param = next((name for name in masks if getattr(params, name)), None)
            output.error_code = "no_token_left"
        self._forget(sequence)
        return output

    def _append(self, sequence: Sequence, sampled: SampledTokens) -> TokenOutput:
        """Take the tokens one by one, up to the one that ends the sequence."""
        taken: list[int] = []
        output = self._output(sequence, taken)
        for token in sampled.token_ids:
            sequence.token_ids.append(token)
            sequence.unsent_tokens.append(token)
            taken.append(token)
            reason, stop = sequence.finish_reason(token, self._report.max_model_len)
            if reason is not None:
                output.finish_reason, output.stop_reason = reason, stop
                self._forget(sequence)
                break
        if sampled.logprobs is not None:
            output.logprobs = sampled.logprobs[: len(output.token_ids)]
        return output

    def _pooled(self, result: StepResult, live: dict[int, Sequence]) -> list[TokenOutput]:
        outputs = []
        for vector in result.vectors:
            if (sequence := live.get(vector.seq_id)) is not None:
                output = self._output(sequence, [])
                output.vector, output.finish_reason = vector.data, "stop"
                self._forget(sequence)
                outputs.append(output)
        return outputs

    def _output(self, sequence: Sequence, token_ids: list[int]) -> TokenOutput:
        output = TokenOutput(request_id=sequence.request.request_id, token_ids=token_ids)
        if not sequence.reported:
            sequence.reported = True
            output.num_cached_tokens = max(0, sequence.num_cached)
            output.queue_time = sequence.queue_time
            if sequence.request.params.prompt_logprobs is not None:
                output.prompt_logprobs = sequence.prompt_logprobs
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


def _known_tokens(sequence: Sequence) -> list[int]:
    """The request's own list where nothing is generated yet: the choices of a request share it, and
    an executor sends it once."""
    generated = sequence.num_generated
    return list(sequence.token_ids) if generated else sequence.request.prompt_token_ids
