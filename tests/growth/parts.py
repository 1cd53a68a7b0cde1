"""Components that a user would add for two features that the engine does not ship."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    BatchPlan,
    Drafter,
    OpTable,
    Sampler,
    SequenceState,
    StructuredOutput,
)
from vllm_di.components.messages import SampledTokens, SamplingParams
from vllm_di.components.program.eager import EagerProgram
from vllm_di.components.sampler.standard import StandardSampler
from vllm_di.errors import RequestError

Count = Annotated[int, msgspec.Meta(ge=1)]


class PromptLookup(Drafter):
    """Guesses that what followed the last tokens before, in the prompt or in the answer, follows
    them again."""

    def __init__(self, *, max_drafts: Count = 4, ngram: Count = 2) -> None:
        self.max_drafts, self._ngram = max_drafts, ngram

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        ids, size = list(token_ids), self._ngram
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == ids[-size:]:
                return ids[start + size : start + size + most]
        return []


class TokenChoice(StructuredOutput):
    """Takes ``{"token_ids": [[...], ...]}``: the answer is one of these lists, and then eos."""

    def __init__(self) -> None: ...

    def check(self, params: SamplingParams) -> None:
        asked = params.structured_output
        if asked is not None and not asked.get("token_ids"):
            raise RequestError("expected {'token_ids': [[...], ...]}", param="structured_output")


def next_tokens(row: SequenceState, drafts: Sequence[int]) -> list[int]:
    """What may follow the answer so far and these guesses."""
    assert row.params.structured_output is not None
    done = [*row.token_ids[row.prompt_len :], *drafts]
    texts = row.params.structured_output["token_ids"]
    open_ = [text for text in texts if text[: len(done)] == done]
    return [t for text in open_ for t in (text[len(done) : len(done) + 1] or row.eos_token_ids)]


class MaskingSampler(Sampler):
    """The standard sampler behind masks that a thread works out while the model runs."""

    def __init__(self, ops: OpTable) -> None:
        self._inner = StandardSampler(ops)
        self._thread = ThreadPoolExecutor(1)
        self._allowed: Future[dict[tuple[int, int], list[int]]] | None = None

    def begin(self, rows: Sequence[SequenceState], drafts: Sequence[list[int]]) -> None:
        self._allowed = self._thread.submit(self._masks, list(zip(rows, drafts, strict=True)))

    def _masks(
        self, asked: list[tuple[SequenceState, list[int]]]
    ) -> dict[tuple[int, int], list[int]]:
        MEETING.meet()
        return {
            (row.seq_id, row.num_generated + at): next_tokens(row, drafts[:at])
            for row, drafts in asked
            if row.params.structured_output is not None
            for at in range(len(drafts) + 1)
        }

    def sample(
        self, logits: Tensor, rows: Sequence[SequenceState]
    ) -> tuple[list[SampledTokens], dict[int, str]]:
        assert self._allowed is not None, "begin() was not called"
        allowed = self._allowed.result()
        for i, row in enumerate(rows):
            if row.params.structured_output is not None:
                keep = torch.tensor(allowed[row.seq_id, row.num_generated])
                mask = torch.full_like(logits[i], -torch.inf)
                logits[i] += mask.index_fill_(0, keep, 0.0)
        return self._inner.sample(logits, rows)


class Meeting:
    """Where the model and the masks of one step wait for each other: neither goes on before the
    other runs. Off but in the test that asks for it."""

    def __init__(self) -> None:
        self.on, self.steps = False, 0
        self._both = threading.Barrier(2)

    def meet(self) -> None:
        """Raises BrokenBarrierError when the other does not come."""
        if self.on:
            self._both.wait(60)


MEETING = Meeting()


class MeetingProgram(EagerProgram):
    """Waits in each step until its masks are being worked out."""

    def run(self, plan: BatchPlan) -> Tensor:
        MEETING.meet()
        MEETING.steps += 1
        return super().run(plan)
