"""One rank's step: the batch, the model, the sampled tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    BatchPlan,
    Device,
    GraphPolicy,
    KvLayout,
    Model,
    ModelProgram,
    ModelRunner,
    Placement,
    PlanShape,
    Pooler,
    Sampler,
    SequenceState,
    ShapePolicy,
)
from vllm_di.components.messages import (
    KvGroup,
    PromptLogprobs,
    SampledTokens,
    ScheduledSequence,
    StepInput,
    StepPlan,
    StepResult,
)
from vllm_di.components.model_runner.batch import Batch
from vllm_di.components.model_runner.hidden import HiddenBuffer, pack
from vllm_di.components.model_runner.pooled import Pooled, pool, poolers_for, pooling_of
from vllm_di.errors import ConfigError

Count = Annotated[int, msgspec.Meta(ge=1)]

log = logging.getLogger(__name__)


class _Wanted(NamedTuple):
    """What a step is to give."""

    rows: list[int]
    """Token rows whose logits are wanted."""
    states: list[SequenceState]
    """The sequences to sample."""
    firsts: list[int]
    """Of each its first row among ``rows``; one more follows for each draft."""
    drafts: list[list[int]]
    """Of each."""
    scored: list[tuple[ScheduledSequence, slice]]
    """Whose prompt log-probabilities to report, of which of ``rows``."""
    pooled: list[Pooled]
    """What the pooler reads."""


class _Sampled(NamedTuple):
    """A sequence that is to be sampled, with drafts."""

    row: int
    state: SequenceState
    drafts: list[int]


def _joined(before: SampledTokens | None, token: SampledTokens) -> SampledTokens:
    if before is None:
        return token
    logprobs = None if before.logprobs is None else before.logprobs + (token.logprobs or [])
    return SampledTokens(token.seq_id, before.token_ids + token.token_ids, logprobs)


class StandardModelRunner(ModelRunner):
    """Runs StepPlans. Every rank runs the same forward; rank 0 samples, on the last stage. With a
    pooler that pools, it takes rows of hidden states in place of logits, and samples nothing.

    With ``static_shapes`` the requests of a step that had to be compiled end with an error.
    """

    def __init__(
        self,
        device: Device,
        model: Model,
        program: ModelProgram,
        kv_layout: KvLayout,
        shapes: ShapePolicy,
        graph: GraphPolicy,
        sampler: Sampler,
        placement: Placement,
        pooler: Pooler | None = None,
        *,
        max_num_seqs: Count,
        max_num_batched_tokens: Count,
        static_shapes: bool = False,
    ) -> None:
        self._device, self._model, self._layout = device, model, kv_layout
        self._shapes, self._graph, self._sampler = shapes, graph, sampler
        self._program, self._run = program, program.run
        self._inference = torch.inference_mode()
        """For the program and the sampler alike. Kept, where a decorator makes one a step: 20 us,
        when a step has emptied the caches."""
        self._samples = placement.rank == 0
        self._pooler = pooler if pooler is not None and pooler.pools() else None
        if self._pooler is not None:
            self.pooling = pooling_of(model, self._pooler)
        elif not model.causal:
            raise ConfigError(
                f"{type(model).__name__} is an encoder and generates no text; take "
                f"pooler={poolers_for(model)}, as it was trained to be used",
                key="pooler",
            )
        self._alone = placement.world_size == 1 and placement.num_stages == 1
        self._largest = PlanShape(
            tokens=max_num_batched_tokens,
            rows=max_num_batched_tokens,
            seqs=max_num_seqs,
            columns=-(-model.max_model_len // kv_layout.block_size),
            queries=min(max_num_batched_tokens, model.max_model_len),
        )
        self._static_shapes, self._num_compiles = static_shapes, 0
        self._batch: Batch
        self._groups: Sequence[KvGroup] = ()
        self._hidden = (
            None
            if model.first
            else HiddenBuffer(
                max_num_batched_tokens, model.hidden_size, model.dtype, device.torch_device
            )
        )

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        self._open(groups)
        for plan in self._warm_up_plans():
            self._program.compile(plan)

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        self._program.allocate(groups, num_blocks)
        self._open(groups)

    def _open(self, groups: Sequence[KvGroup]) -> None:
        """Make the batch's buffers, once."""
        if self._groups:
            return
        self._groups = groups
        self._batch = Batch(
            max_num_seqs=self._largest.seqs,
            max_num_tokens=self._largest.tokens,
            max_model_len=self._model.max_model_len,
            block_size=self._layout.block_size,
            groups=groups,
            device=self._device,
            has_types=self.pooling is not None and self.pooling.token_types > 0,
        )

    def warm_up(self) -> None:
        decodes: set[int] = set()
        sampled: set[int] = set()
        for plan in self._warm_up_plans():
            out = self._program.warm_up(plan)
            if plan.max_query_len <= 1:
                decodes.add(len(plan.token_ids))
            wants_tokens = self._samples and self._model.last and self._pooler is None
            if wants_tokens and len(out) and len(out) not in sampled:
                sampled.add(len(out))
                self._sampler.warm_up(out)
        self._graph.capture(sorted(decodes), self._blank_decodes)
        self._device.synchronize()
        self._num_compiles = self._program.num_compiles

    def _warm_up_plans(self) -> Iterator[BatchPlan]:
        for plan in self._shapes.warm_up_plans(self._largest, self._batch.blank):
            yield self._with_hidden(plan)

    def _blank_decodes(self, size: int) -> Tensor:
        count = min(size, self._largest.seqs)
        plan = self._shapes.pad(self._batch.blank(PlanShape(count, count, count, 1, 1)))
        return self._run(self._with_hidden(plan))

    def _with_hidden(self, plan: BatchPlan) -> BatchPlan:
        if self._hidden is not None:
            plan.hidden = self._hidden.blank(len(plan.token_ids))
        return plan

    def execute(self, step: StepInput) -> StepResult:
        with self._inference:
            return self._execute(step)

    def _execute(self, step: StepInput) -> StepResult:
        plan, batch = step.plan, self._batch
        batch.update(plan)
        if not plan.scheduled:
            return StepResult(plan.step, [])
        wanted = self._wanted(plan)
        total = sum([share.num_tokens for share in plan.scheduled])
        built = self._shapes.pad(batch.build(plan.scheduled, wanted.rows))
        if self._hidden is not None:
            assert step.hidden is not None, "a stage that is not the first has no hidden states"
            built.hidden = self._hidden.fill(step.hidden, len(built.token_ids))
        if wanted.states and self._samples and self._model.last:
            self._sampler.begin(wanted.states, wanted.drafts)
        try:
            out = self._run(built)
        except torch.OutOfMemoryError as error:
            if not self._alone:  # the others are in the middle of the step, and wait
                raise
            log.exception("a step of %d tokens ran out of memory", total)
            reason = f"out of memory in a step of {total} tokens: {error}"
            return StepResult(plan.step, [], failed={s.seq_id: reason for s in plan.scheduled})
        compiled, late = self._compiled(plan, built)
        if not self._model.last:
            hidden = pack(out[:total])
            return StepResult(plan.step, [], failed=late, hidden=hidden, num_compiles=compiled)
        if late or not self._samples:
            return StepResult(plan.step, [], failed=late, num_compiles=compiled)
        if out.shape[0] > len(wanted.rows):
            out = out[: len(wanted.rows)]
        if self._pooler is not None:
            vectors, failed = pool(self._pooler, wanted.pooled, out)
            return StepResult(plan.step, [], vectors=vectors, failed=failed, num_compiles=compiled)
        prompts, failed = self._score(wanted.scored, out)
        try:
            tokens, others = self._sample(out, wanted)
        except Exception as error:  # the logits may be half edited: the step's requests end, not us
            log.exception("sampling failed")
            reason = f"sampling failed: {type(error).__name__}: {error}"
            tokens, others = [], {state.seq_id: reason for state in wanted.states}
        if failed:
            tokens = [token for token in tokens if token.seq_id not in failed]
        faults = self._sampler.request_faults
        refused = [seq_id for seq_id, reason in others.items() if reason in faults]
        return StepResult(
            plan.step, tokens, prompts, failed | others, refused, num_compiles=compiled
        )

    def _compiled(self, plan: StepPlan, built: BatchPlan) -> tuple[int, dict[int, str]]:
        """-> programs that the step had to compile; seq_id -> reason where that is an error."""
        compiled = self._program.num_compiles - self._num_compiles
        if not compiled:
            return 0, {}
        self._num_compiles += compiled
        log.warning(
            "a step of the shape %s waited for its compiler: shapes.warm_up_plans lacks it",
            built.shape,
        )
        if not self._static_shapes:
            return compiled, {}
        reason = (
            f"a step of the shape {built.shape} was not compiled at the start, and the platform "
            "says capabilities.static_shapes"
        )
        return compiled, {share.seq_id: reason for share in plan.scheduled}

    def _wanted(self, plan: StepPlan) -> _Wanted:
        wanted = _Wanted([], [], [], [], [], [])
        rows, start = wanted.rows, 0
        for share, state in zip(plan.scheduled, self._batch.states, strict=True):
            end = start + share.num_tokens
            if self._pooler is not None:
                first, length = share.num_computed, state.prompt_len
                read = self._pooler.wanted(first, share.num_tokens, length)
                span = slice(len(rows), len(rows) + len(read))
                wanted.pooled.append(Pooled(state, span, share.samples))
                rows += [start + position - first for position in read]
                start = end
                continue
            if state.params.prompt_logprobs is not None:
                # the row of position p tells of the prompt's token p + 1
                inside = min(share.num_tokens, state.prompt_len - 1 - share.num_computed)
                if inside > 0:
                    wanted.scored.append((share, slice(len(rows), len(rows) + inside)))
                    rows += range(start, start + inside)
            if share.samples:
                drafts = share.draft_tokens
                wanted.states.append(state)
                wanted.firsts.append(len(rows))
                wanted.drafts.append(drafts)
                if drafts:
                    rows += range(end - 1 - len(drafts), end)
                else:
                    rows.append(end - 1)
            start = end
        return wanted

    def _sample(
        self, logits: Tensor, wanted: _Wanted
    ) -> tuple[list[SampledTokens], dict[int, str]]:
        """One token of each sequence, and a further one for each draft that proved right: what is
        chosen is what would have been chosen without drafts."""
        if not any(wanted.drafts):
            if len(wanted.states) < logits.shape[0]:  # rows of prompts beside them
                logits = logits[wanted.firsts]
            return self._sampler.sample(logits, wanted.states)
        sampled = list(map(_Sampled, wanted.firsts, wanted.states, wanted.drafts))
        chosen: dict[int, SampledTokens] = {}
        failed: dict[int, str] = {}
        lengths = [len(one.state.token_ids) for one in sampled]
        try:
            at, active = 0, sampled
            while active:
                rows = logits[[one.row + at for one in active]]
                tokens, others = self._sampler.sample(rows, [one.state for one in active])
                failed |= others
                found = {token.seq_id: token for token in tokens}
                for one in active:
                    if (token := found.get(one.state.seq_id)) is not None:
                        one.state.token_ids += token.token_ids
                        chosen[token.seq_id] = _joined(chosen.get(token.seq_id), token)
                active = [
                    one
                    for one in active
                    if at < len(one.drafts) and one.state.token_ids[-1] == one.drafts[at]
                    if one.state.seq_id in found
                ]
                at += 1
        finally:  # the scheduler hands over what it kept, with the next step
            for one, length in zip(sampled, lengths, strict=True):
                del one.state.token_ids[length:]
        return [token for token in chosen.values() if token.seq_id not in failed], failed

    def _score(
        self, scored: list[tuple[ScheduledSequence, slice]], logits: Tensor
    ) -> tuple[list[PromptLogprobs], dict[int, str]]:
        """-> log-probabilities of prompts, and seq_id -> reason where they are no numbers."""
        prompts: list[PromptLogprobs] = []
        failed: dict[int, str] = {}
        for share, span in scored:
            state = self._batch.sequences[share.seq_id]
            first = share.num_computed + 1
            ids = state.token_ids[first : first + span.stop - span.start]
            count = state.params.prompt_logprobs or 0
            positions = self._sampler.prompt_logprobs(logits[span], ids, count)
            if any(math.isnan(position.logprobs[0]) for position in positions):
                failed[share.seq_id] = "the model gave prompt logits that are not finite"
            else:
                prompts.append(PromptLogprobs(share.seq_id, first, positions))
        return prompts, failed
