"""One rank's step: the batch, the model, the sampled tokens."""

from __future__ import annotations

import logging
import math
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    Device,
    GraphPolicy,
    KvLayout,
    LayerCache,
    Model,
    ModelProgram,
    ModelRunner,
    Placement,
    Sampler,
    SequenceState,
    ShapePolicy,
)
from vllm_di.components.messages import (
    HiddenStates,
    PromptLogprobs,
    ScheduledSequence,
    StepPlan,
    StepResult,
)
from vllm_di.components.model_runner.batch import Batch
from vllm_di.components.model_runner.hidden import HiddenBuffer, pack

Count = Annotated[int, msgspec.Meta(ge=1)]

log = logging.getLogger(__name__)


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
        self._run = program.run
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
        self._batch = Batch(
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            max_model_len=model.max_model_len,
            block_size=kv_layout.block_size,
            device=device,
        )
        self._hidden = (
            None
            if model.first
            else HiddenBuffer(max_num_tokens, model.hidden_size, model.dtype, device.torch_device)
        )
        self._caches: list[LayerCache] = []

    def allocate(self, num_blocks: int) -> None:
        self._caches = self._layout.allocate(self._model.kv_specs(), num_blocks, self._model.dtype)

    def warm_up(self) -> None:
        for size in self._warm_up_sizes:
            self._blank_step(size)
        self._graph.capture(self._warm_up_sizes, self._blank_decodes)
        self._device.synchronize()

    def _blank_step(self, num_tokens: int) -> Tensor:
        batch = self._batch.blank(num_tokens)
        if self._hidden is not None:
            batch.hidden = self._hidden.blank(num_tokens)
        return self._run(batch, self._caches)

    def _blank_decodes(self, num_tokens: int) -> Tensor:
        return self._run(self._batch.blank_decodes(num_tokens), self._caches)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, hidden: HiddenStates | None = None) -> StepResult:
        batch = self._batch
        batch.update(plan)
        if not plan.scheduled:
            return StepResult(plan.step, [])
        rows, sampled, scored = self._wanted_rows(plan)
        total = sum(s.num_tokens for s in plan.scheduled)
        built = batch.build(plan.scheduled, rows, self._shapes.padded_tokens(total))
        if self._hidden is not None:
            assert hidden is not None, "a stage that is not the first was given no hidden states"
            built.hidden = self._hidden.fill(hidden, len(built.token_ids))
        try:
            out = self._run(built, self._caches)
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
        prompts, failed = self._score(scored, out)
        logits = out if len(sampled) == len(rows) else out[[i for i, _ in sampled]]
        try:
            tokens, others = self._sampler.sample(logits, [state for _, state in sampled])
        except Exception as error:  # the logits may be half edited: the step's requests end, not us
            log.exception("sampling failed")
            reason = f"sampling failed: {type(error).__name__}: {error}"
            tokens, others = [], {state.seq_id: reason for _, state in sampled}
        if failed:
            tokens = [token for token in tokens if token.seq_id not in failed]
        faults = self._sampler.request_faults
        refused = [seq_id for seq_id, reason in others.items() if reason in faults]
        return StepResult(plan.step, tokens, prompts, failed | others, refused)

    def _wanted_rows(
        self, plan: StepPlan
    ) -> tuple[list[int], list[tuple[int, SequenceState]], list[tuple[ScheduledSequence, slice]]]:
        """-> token rows whose logits are wanted; (index into these, sequence) to sample; (share,
        span of these) to report prompt log-probabilities of."""
        rows: list[int] = []
        sampled: list[tuple[int, SequenceState]] = []
        scored: list[tuple[ScheduledSequence, slice]] = []
        start = 0
        for share in plan.scheduled:
            state = self._batch.sequences[share.seq_id]
            end = start + share.num_tokens
            if state.params.prompt_logprobs is not None:
                # the row of position p tells of the prompt's token p + 1
                inside = min(share.num_tokens, state.prompt_len - 1 - share.num_computed)
                if inside > 0:
                    scored.append((share, slice(len(rows), len(rows) + inside)))
                    rows += range(start, start + inside)
            if share.samples:
                sampled.append((len(rows), state))
                rows.append(end - 1)
            start = end
        return rows, sampled, scored

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
