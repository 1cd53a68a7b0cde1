"""Plays the scheduler: gives out shuffled blocks, cuts prompts into chunks, mixes, preempts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_di.components.interfaces import ModelRunner
from vllm_di.components.messages import (
    NewSequence,
    PromptLogprobs,
    SampledTokens,
    SamplingParams,
    ScheduledSequence,
    StepInput,
    StepPlan,
    StepResult,
)

BLOCK = 4


@dataclass
class Request:
    """One sequence as the scheduler sees it."""

    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    sampled: list[SampledTokens] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    error: str | None = None
    seq_id: int = -1
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    last: int = -1

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.output) >= (self.params.max_tokens or 0)


def request(prompt: Sequence[int], max_tokens: int = 6, **params: Any) -> Request:
    params = {"temperature": 0.0, "max_tokens": max_tokens, **params}
    return Request(list(prompt), SamplingParams(**params), tokens=list(prompt))


class Driver:
    """Runs requests to their end on one runner, by the plans that ``choose`` makes."""

    def __init__(self, runner: ModelRunner, num_blocks: int, seed: int = 0) -> None:
        self._runner = runner
        self._random = random.Random(seed)
        self._free = list(range(num_blocks))
        self._random.shuffle(self._free)
        self._finished: list[int] = []
        self._next_id = self._step = 0
        self.live: list[Request] = []
        self.results: list[StepResult] = []

    def run(
        self, requests: Sequence[Request], chunk: int | Callable[[], int] = 64, at_once: int = 8
    ) -> list[Request]:
        """All of them, ``at_once`` beside each other, prompts in pieces of ``chunk`` tokens."""
        waiting = list(requests)
        while waiting or self.live:
            while waiting and len(self.live) < at_once:
                self.live.append(waiting.pop(0))
            self.step([(one, chunk() if callable(chunk) else chunk) for one in self.live])
        return list(requests)

    def step(self, shares: Sequence[tuple[Request, int]]) -> StepResult:
        """One step: each request with the most tokens that it may run."""
        new, scheduled = [], []
        ordered = sorted(shares, key=lambda s: len(s[0].tokens) - s[0].computed > 1)
        for one, most in ordered:
            if one.seq_id < 0:
                new.append(self._admit(one))
            scheduled.append(self._share(one, most))
        self._step += 1
        finished, self._finished = self._finished, []
        result = self._runner.execute(StepInput(StepPlan(self._step, new, scheduled, finished)))
        assert result.step == self._step
        self.results.append(result)
        self._take(result)
        return result

    def preempt(self, one: Request) -> None:
        """Take its blocks; it runs again from the start, under another id."""
        self.forget(one)
        one.seq_id, one.computed, one.last = -1, 0, -1
        one.prompt_logprobs = []

    def forget(self, one: Request) -> None:
        if one.seq_id >= 0:
            self._finished.append(one.seq_id)
        self._free += one.blocks
        one.blocks = []

    def _admit(self, one: Request) -> NewSequence:
        one.seq_id, self._next_id = self._next_id, self._next_id + 1
        return NewSequence(
            seq_id=one.seq_id,
            params=one.params,
            token_ids=list(one.tokens),
            prompt_len=len(one.prompt),
            eos_token_ids=[0],
        )

    def _share(self, one: Request, most: int) -> ScheduledSequence:
        count = min(most, len(one.tokens) - one.computed)
        end = one.computed + count
        missing = -(-end // BLOCK) - len(one.blocks)
        fresh = [self._free.pop(self._random.randrange(len(self._free))) for _ in range(missing)]
        one.blocks += fresh
        share = ScheduledSequence(
            seq_id=one.seq_id,
            num_computed=one.computed,
            num_tokens=count,
            new_blocks=[fresh],
            new_tokens=[] if one.last < 0 else [one.last],
            samples=end == len(one.tokens),
            is_prefill=one.computed < len(one.tokens) - 1,
        )
        one.computed, one.last = end, -1
        return share

    def _take(self, result: StepResult) -> None:
        by_id = {one.seq_id: one for one in self.live}
        for scored in result.prompt_logprobs:
            by_id[scored.seq_id].prompt_logprobs.append(scored)
        for seq_id, reason in result.failed.items():
            by_id[seq_id].error = reason
        for token in result.tokens:
            one = by_id[token.seq_id]
            (chosen,) = token.token_ids
            one.tokens.append(chosen)
            one.sampled.append(token)
            one.last = chosen
        for one in [one for one in self.live if one.done]:
            self.live.remove(one)
            self.forget(one)
