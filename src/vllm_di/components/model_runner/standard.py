"""One rank's step: the batch, the model, the sampled tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    Device,
    GraphPolicy,
    KvLayout,
    Model,
    ModelProgram,
    ModelRunner,
    Placement,
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
    """Runs StepPlans. Every rank runs the same forward; rank 0 samples, on the last stage."""

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
        *,
        max_num_seqs: Count,
        max_num_batched_tokens: Count,
    ) -> None:
        self._device, self._model, self._layout = device, model, kv_layout
        self._shapes, self._graph, self._sampler = shapes, graph, sampler
        self._program, self._run = program, program.run
        self._samples = placement.rank == 0
        self._alone = placement.world_size == 1 and placement.num_stages == 1
        # a warm-up step is never longer than a sequence, nor than a step
        self._warm_up_tokens = min(max_num_batched_tokens, model.max_model_len)
        self._warm_up_sizes = shapes.warm_up_sizes(self._warm_up_tokens)
        max_num_tokens = max(
            max_num_batched_tokens,
            shapes.padded_tokens(max_num_batched_tokens),
            *self._warm_up_sizes,
        )
        self._max_num_seqs, self._max_num_tokens = max_num_seqs, max_num_tokens
        self._batch: Batch
        self._hidden = (
            None
            if model.first
            else HiddenBuffer(max_num_tokens, model.hidden_size, model.dtype, device.torch_device)
        )

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        self._program.allocate(groups, num_blocks)
        self._batch = Batch(
            max_num_seqs=self._max_num_seqs,
            max_num_tokens=self._max_num_tokens,
            max_model_len=self._model.max_model_len,
            block_size=self._layout.block_size,
            groups=groups,
            device=self._device,
        )

    def warm_up(self) -> None:
        for size in self._warm_up_sizes:
            self._blank_step(size)
        self._graph.capture(self._warm_up_sizes, self._blank_decodes)
        self._device.synchronize()

    def _blank_step(self, num_tokens: int) -> Tensor:
        batch = self._batch.blank(num_tokens)
        if self._hidden is not None:
            batch.hidden = self._hidden.blank(num_tokens)
        return self._run(batch)

    def _blank_decodes(self, num_tokens: int) -> Tensor:
        return self._run(self._batch.blank_decodes(num_tokens))

    def execute(self, step: StepInput) -> StepResult:
        plan, batch = step.plan, self._batch
        batch.update(plan)
        if not plan.scheduled:
            return StepResult(plan.step, [])
        wanted = self._wanted(plan)
        total = sum([share.num_tokens for share in plan.scheduled])
        built = batch.build(plan.scheduled, wanted.rows, self._shapes.padded_tokens(total))
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
        if not self._model.last:
            return StepResult(plan.step, [], hidden=pack(out[:total]))
        if not self._samples:
            return StepResult(plan.step, [])
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
        return StepResult(plan.step, tokens, prompts, failed | others, refused)

    def _wanted(self, plan: StepPlan) -> _Wanted:
        wanted = _Wanted([], [], [], [], [])
        rows, start = wanted.rows, 0
        for share, state in zip(plan.scheduled, self._batch.states, strict=True):
            end = start + share.num_tokens
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
            if len(wanted.states) < len(logits):  # rows of prompts beside them
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
