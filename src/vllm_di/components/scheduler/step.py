"""A step in the making: what it holds so far, and what is left of each limit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vllm_di.components.messages import LimitsReport, NewSequence, ScheduledSequence
from vllm_di.components.scheduler.sequence import Sequence

PROMPT_LOGPROBS_CHUNK = 256
"""Prompt tokens of a step for a request that wants prompt log-probabilities: each needs a row of
logits."""


@dataclass(slots=True, frozen=True)
class StepLimits:
    """What bounds every step of an engine."""

    platform: LimitsReport
    max_tokens: int
    block_size: int
    chunks_prompts: bool
    """False: a prompt runs whole, in one step."""


class Step:
    """Sequences are taken into it one by one."""

    def __init__(self, limits: StepLimits, prompt_budget: int) -> None:
        self._limits, self._platform = limits, limits.platform
        self.budget = limits.max_tokens
        """Tokens that still fit."""
        self.prompt_budget = prompt_budget
        """Of the budget, what prompts may take."""
        self.is_of_prompts = False
        """Whether it runs beside a step of decodes."""
        self.most_drafts = 0
        self.prefills = 0
        self.new: list[NewSequence] = []
        self.scheduled: dict[int, ScheduledSequence] = {}
        self._context = 0

    @property
    def num_tokens(self) -> int:
        return self._limits.max_tokens - self.budget

    def prefill_allowed(self) -> bool:
        most = self._platform.max_prefill_rows
        return most is None or self.prefills < most

    def holds_context(self, length: int) -> bool:
        """Whether a sequence of ``length`` tokens fits beside those that are in it."""
        most = self._platform.max_batch_context
        return most is None or self._context + length <= most

    def chunk(self, sequence: Sequence, remaining: int) -> int:
        """How many of the sequence's ``remaining`` tokens may run in this step."""
        count = min(remaining, self.budget)
        if remaining > 1:
            if not self.prefill_allowed():
                return 0
            if sequence.request.params.prompt_logprobs is not None:
                count = min(count, PROMPT_LOGPROBS_CHUNK)
            count = min(count, self._prompt_share(sequence, remaining))
            if count < remaining and not self._limits.chunks_prompts:
                return 0
        if self.scheduled and not self.holds_context(len(sequence.token_ids) - remaining + count):
            return 0
        return count

    def _prompt_share(self, sequence: Sequence, remaining: int) -> int:
        """What the prompts' budget leaves of a prompt's ``remaining`` tokens: all, or as many as
        end with a block, where that is any."""
        if remaining <= self.prompt_budget:
            return remaining
        if not self._limits.chunks_prompts:  # one at a time, however long it is
            return 0 if self.prefills else remaining
        start = len(sequence.token_ids) - remaining
        beyond = (start + self.prompt_budget) % self._limits.block_size
        return self.prompt_budget - beyond if beyond < self.prompt_budget else self.prompt_budget

    def start(self, sequence: Sequence, eos_token_ids: list[int]) -> None:
        """A sequence that the workers do not know: it is told to them with this step."""
        self.new.append(
            NewSequence(
                seq_id=sequence.seq_id,
                params=sequence.request.params,
                token_ids=_known_tokens(sequence),
                prompt_len=sequence.prompt_len,
                eos_token_ids=eos_token_ids,
                bad_words_token_ids=sequence.request.bad_words_token_ids,
                token_type_ids=sequence.request.token_type_ids,
            )
        )

    def take(
        self,
        sequence: Sequence,
        count: int,
        drafts: Collection[int],
        new_blocks: list[list[int]],
    ) -> None:
        """``count`` known tokens of a running sequence, and drafts of more."""
        remaining = len(sequence.token_ids) - sequence.num_computed
        is_prefill = remaining > 1
        self.scheduled[sequence.seq_id] = ScheduledSequence(
            seq_id=sequence.seq_id,
            num_computed=sequence.num_computed,
            num_tokens=count + len(drafts),
            new_blocks=new_blocks,
            new_tokens=sequence.unsent_tokens,
            samples=count == remaining,
            is_prefill=is_prefill,
            draft_tokens=list(drafts),
        )
        self._count(self.scheduled[sequence.seq_id], 1)
        self.prefills += is_prefill

    def withdraw(self, seq_id: int) -> None:
        """What was taken of a sequence, if anything, is not in it any more."""
        share = self.scheduled.pop(seq_id, None)
        if share is not None:
            self._count(share, -1)
            self.new = [n for n in self.new if n.seq_id != seq_id]

    def _count(self, share: ScheduledSequence, sign: int) -> None:
        self.budget -= sign * share.num_tokens
        if share.is_prefill:
            self.prompt_budget -= sign * share.num_tokens
        self._context += sign * (share.num_computed + share.num_tokens)


def _known_tokens(sequence: Sequence) -> list[int]:
    """The request's own list where nothing is generated yet: the choices of a request share it, and
    an executor sends it once."""
    generated = sequence.num_generated
    return list(sequence.token_ids) if generated else sequence.request.prompt_token_ids
