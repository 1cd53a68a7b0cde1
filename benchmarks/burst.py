"""A burst of prompts while others read: how long the readers' tokens stall, and how long the burst
waits, for several values of ``scheduler.max_step_ms``.

    python -m benchmarks.burst [--values null,50,100] [--rounds 3] [--prompt 256] [overrides]

One server for each value, all of them started before and idle while another is measured; they take
turns. Four requests stream when sixteen more come at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
from dataclasses import dataclass, field

from vllm_di.commands.arguments import Arguments
from vllm_di.commands.bench import prompts
from vllm_di.commands.bench_serve import VOCABULARY, Timing, model_name, server, stream
from vllm_di.commands.table import print_table
from vllm_di.components.device.system import cpu_name

READERS, BURST = 4, 16
READ, ANSWER = 160, 16
"""Tokens that a reader and a request of the burst generate."""
BEFORE = 8
"""Tokens that each reader has when the burst comes."""


@dataclass
class Row:
    """Of all rounds of one value, in milliseconds."""

    steady: list[float] = field(default_factory=list)
    """Between the readers' tokens before the burst."""
    stalls: list[float] = field(default_factory=list)
    """Between the readers' tokens, from the burst on until all of it has its first token."""
    first: list[float] = field(default_factory=list)
    """From the burst to each first token."""
    rates: list[float] = field(default_factory=list)
    """Tokens a second of all requests, in each round."""


def main() -> None:
    words = sys.argv[1:]
    values = option(words, "--values", "null,50,100,200").split(",")
    rounds = int(option(words, "--rounds", "3"))
    length = int(option(words, "--prompt", "256"))
    rows = {value: Row() for value in values}
    with contextlib.ExitStack() as stack:
        addresses = {
            value: stack.enter_context(
                server(Arguments(overrides=[*words, f"scheduler.max_step_ms={value}"]))
            )
            for value in values
        }
        for number in range(-1, rounds):  # the first round does not count
            for value, address in addresses.items():
                row = rows[value] if number >= 0 else Row()
                asyncio.run(_round(address, row, length, number + 1))
    print(
        f"{READERS} readers, then {BURST} prompts of {length} tokens at once; {cpu_name()}, "
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {rounds} rounds\n"
    )
    titles = ["max_step_ms", "ITL before p50", "ITL p50", "p90", "p99", "TTFT p50", "p99", "tok/s"]
    print_table(titles, [[value, *_shown(row)] for value, row in rows.items()])


def option(words: list[str], name: str, default: str) -> str:
    """The value of an option, which is taken out of ``words``."""
    if name not in words:
        return default
    place = words.index(name)
    value = words[place + 1]
    del words[place : place + 2]
    return value


async def _round(address: str, row: Row, length: int, seed: int) -> None:
    host, port = address.removeprefix("http://").split(":")
    model, loop = await model_name(host, int(port)), asyncio.get_running_loop()
    ids = prompts(READERS + BURST, length, VOCABULARY, seed)
    began, ready = loop.time(), asyncio.Event()
    readers = [Timing() for _ in range(READERS)]

    async def one(timing: Timing, prompt: list[int], count: int) -> None:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
        }
        await stream(host, int(port), body, timing)
        if timing.failed:
            raise RuntimeError(timing.failed)

    async def watch() -> None:
        while min(len(t.tokens) for t in readers) < BEFORE:
            await asyncio.sleep(0.002)
        ready.set()

    pairs = zip(readers, ids, strict=False)
    reading = [asyncio.create_task(one(t, prompt, READ)) for t, prompt in pairs]
    watching = asyncio.create_task(watch())
    await asyncio.wait([*reading, watching], return_when=asyncio.FIRST_COMPLETED)
    burst_at = loop.time() - began
    late = [Timing() for _ in range(BURST)]
    pairs = zip(late, ids[READERS:], strict=True)
    await asyncio.gather(*(one(t, prompt, ANSWER) for t, prompt in pairs))
    seconds = loop.time() - began
    tokens = sum(len(t.tokens) for t in [*readers, *late])
    row.rates.append(tokens / seconds)
    last_first = burst_at + max(t.tokens[0] for t in late)
    for timing in readers:
        for a, b in zip(timing.tokens, timing.tokens[1:], strict=False):
            if b < burst_at:
                row.steady.append(1e3 * (b - a))
            elif a < last_first:
                row.stalls.append(1e3 * (b - a))
    row.first += [1e3 * t.tokens[0] for t in late]
    await asyncio.gather(*reading)


def _shown(row: Row) -> list[str]:
    stalls, first = sorted(row.stalls), sorted(row.first)
    figures = [
        statistics.median(row.steady),
        *(share(stalls, share) for share in (50, 90, 99)),
        *(share(first, share) for share in (50, 99)),
        statistics.median(row.rates),
    ]
    return [f"{figure:,.0f}" for figure in figures]


def share(values: list[float], share: int) -> float:
    return values[(len(values) - 1) * share // 100]


if __name__ == "__main__":
    main()
