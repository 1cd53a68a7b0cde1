"""Mixed load for a while: no request is lost, and memory does not grow with their number."""

from __future__ import annotations

import random
import time

from vllm_di.components.interfaces import Engine
from vllm_di.components.messages import SamplingParams
from vllm_di.conformance.driving import Ask, run
from vllm_di.conformance.footprint import footprint, resident, settled
from vllm_di.conformance.outcomes import Record
from vllm_di.conformance.subject import Subject

SECONDS = {"short": 4.0, "full": 600.0}
WINDOWS = {"short": 6, "full": 2}
"""Periods of ``SECONDS`` within which memory must stop growing: until then, caches of kernels for
each batch shape may fill."""
ROUNDS = 6
"""Rounds of requests, which are repeated all the time: libraries keep about 200 KB for each new
shape of a GEMM, and repeated requests soon bring no new shapes. Growth after that is growth with
the number of requests."""
BATCH = 24
SLOPE = {"short": 16 * 1024, "full": 100}
"""Resident bytes for each request. The short form has few requests, among which an allocator's own
pages weigh more."""
LEAK = 32
"""Times the bar: growth by this much in two windows running is no cache that fills."""


def mixed(chance: random.Random) -> Ask:
    """Any length, greedy or drawn, with whatever a client may ask for."""
    prompt = [chance.randrange(250) for _ in range(chance.randrange(1, 120))]
    more: dict[str, object] = {}
    if chance.random() < 0.5:
        more |= {"temperature": 0}
    else:
        more |= {"top_k": chance.choice([0, 5]), "top_p": 0.9, "seed": chance.randrange(10**6)}
    if chance.random() < 0.3:
        more |= {"logprobs": 3}
    if chance.random() < 0.3:
        more |= {"presence_penalty": 0.5, "repetition_penalty": 1.1}
    length = chance.randrange(1, 24)
    return Ask(prompt=prompt, params=SamplingParams(max_tokens=length, **more))  # type: ignore[arg-type]


def test_mixed_load(subject: Subject, record: Record) -> None:
    chance = random.Random(subject.seed)
    with subject.engine() as engine:
        rounds = [[mixed(chance) for _ in range(BATCH)] for _ in range(ROUNDS)]
        for _ in range(2):  # the second time the prompts are in the prefix cache
            once(engine, rounds)
        base, slopes = footprint(), list[float]()
        while not is_settled(slopes, subject.form):
            memory, begin = resident(), time.monotonic()
            requests, tokens = window_of_load(engine, rounds, SECONDS[subject.form])
            seconds = time.monotonic() - begin
            slopes.append((resident() - memory) / requests)
        assert engine.step().stats.kv_cache_usage == 0, "blocks never came back"
        more = settled(base)
    record.figure(
        requests=requests,
        tokens_per_second=round(tokens / seconds),
        bytes_per_request=round(slopes[-1]),
        windows=len(slopes),
    )
    assert not more, f"grew under load: {'; '.join(more)}"
    bar = SLOPE[subject.form]
    assert slopes[-1] < bar, f"{slopes[-1]:.0f} resident bytes more with each request"


def is_settled(slopes: list[float], form: str) -> bool:
    """Whether more windows would tell nothing: memory rests, there have been all, or it grew by
    ``LEAK`` times the bar twice running."""
    if not slopes:
        return False
    leaks = len(slopes) > 1 and min(slopes[-2:]) >= LEAK * SLOPE[form]
    return slopes[-1] < SLOPE[form] or len(slopes) >= WINDOWS[form] or leaks


def window_of_load(engine: Engine, rounds: list[list[Ask]], seconds: float) -> tuple[int, int]:
    """-> requests and tokens that came back."""
    requests = tokens = 0
    begin = time.monotonic()
    while time.monotonic() - begin < seconds or not requests:
        tokens += once(engine, rounds)
        requests += BATCH * len(rounds)
    return requests, tokens


def once(engine: Engine, rounds: list[list[Ask]]) -> int:
    """Runs each round in the engine; returns the generated tokens."""
    tokens = 0
    for asks in rounds:
        for answer in run(engine, asks, start=lambda index: index // 2):
            assert answer.error is None, answer.error
            assert answer.finish_reason in ("stop", "length"), answer.finish_reason
            tokens += len(answer.token_ids)
    return tokens
