"""Requests through an engine, as the frontend would send them; answers as plain data."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from vllm_di.components.interfaces import Engine
from vllm_di.components.messages import (
    EngineRequest,
    EngineStats,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)

PATIENCE = 120.0
"""Seconds after which an engine that still has work counts as hung."""
IDLE, IDLE_STEPS = 1.0, 20
"""Seconds, and steps, that an engine with work may go without scheduling anything or giving an
answer. Steps count too, as all of a machine may stand still for a second."""


class Ask(msgspec.Struct, kw_only=True):
    """One request."""

    prompt: list[int]
    params: SamplingParams
    salt: str | None = None
    priority: int = 0


class Answer(msgspec.Struct, kw_only=True):
    """Its result."""

    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finish_reason: str | None = None
    num_cached: int = 0
    error: str | None = None


def greedy(count: int, **more: Any) -> SamplingParams:
    """``count`` tokens, whatever they are."""
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **more)


def prompt_of(length: int) -> list[int]:
    """So many tokens, others for each length."""
    return [(7 * i + 3 * length) % 251 for i in range(length)]


def ask(prompt: Sequence[int], count: int, **params: Any) -> Ask:
    """A greedy request."""
    return Ask(prompt=list(prompt), params=greedy(count, **params))


def apart(asks: Iterable[Ask]) -> list[Ask]:
    """The same requests, each with a salt of its own: none shares blocks with any other."""
    return [msgspec.structs.replace(one, salt=uuid.uuid4().hex) for one in asks]


def run(
    engine: Engine,
    asks: Iterable[Ask],
    *,
    each_step: Callable[[int], None] | None = None,
    watch: Callable[[EngineStats], None] | None = None,
    start: Callable[[int], int] = lambda index: 0,
) -> list[Answer]:
    """All answers, in order. Request i is added before step ``start(i)``; ``each_step`` is called
    with the number of the step to come, ``watch`` with the gauges after each. Raises AssertionError
    when the engine gets stuck."""
    waiting = {f"ask-{i}": one for i, one in enumerate(asks)}
    answers = {name: Answer() for name in waiting}
    step, begin = 0, time.monotonic()
    scheduled, moved, num_idle = -1, begin, 0
    while waiting or engine.has_work():
        for name in [n for n in waiting if start(int(n.split("-")[1])) <= step]:
            add(engine, name, waiting.pop(name))
        if each_step is not None:
            each_step(step)
        outputs = engine.step()
        if watch is not None:
            watch(outputs.stats)
        for output in outputs.outputs:
            if output.request_id in answers:
                take(answers[output.request_id], output)
        step, now = step + 1, time.monotonic()
        num_idle += 1
        if outputs.stats.num_steps != scheduled or outputs.outputs:
            scheduled, moved, num_idle = outputs.stats.num_steps, now, 0
        is_stuck = now - moved > IDLE and num_idle > IDLE_STEPS
        assert not is_stuck, "the engine has work, but schedules none of it"
        assert now - begin < PATIENCE, f"the engine still has work after {step} steps"
    unfinished = [n for n, answer in answers.items() if answer.finish_reason is None]
    assert not unfinished, f"requests without an end: {', '.join(unfinished)}"
    return list(answers.values())


def add(engine: Engine, name: str, one: Ask) -> None:
    """Hand one request to the engine."""
    engine.add(
        EngineRequest(
            request_id=name,
            prompt_token_ids=one.prompt,
            params=one.params,
            cache_salt=one.salt,
            priority=one.priority,
        )
    )


def take(answer: Answer, output: TokenOutput) -> None:
    """Add what a step brought."""
    answer.token_ids += output.token_ids
    answer.logprobs += output.logprobs or []
    answer.prompt_logprobs += output.prompt_logprobs or []
    answer.num_cached = max(answer.num_cached, output.num_cached_tokens)
    answer.finish_reason = output.finish_reason or answer.finish_reason
    answer.error = output.error or answer.error


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]
