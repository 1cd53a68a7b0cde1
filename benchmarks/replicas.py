"""Two replicas beside one engine: throughput, hits in the prefix cache, and what a choice costs.

    python -m benchmarks.replicas [--rounds 3] [--requests 32] [--only PART] [overrides]

PART is router, throughput or hits.

Throughput: servers of one and of two replicas, each replica with one thread, take turns on the
same requests; the other stands still. Hits: a trace of requests that share beginnings, on one
engine with a cache of some size and on two replicas with half of it each, under each router.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence

import psutil

from benchmarks.burst import option
from vllm_di.commands.arguments import Arguments
from vllm_di.commands.bench import prompts
from vllm_di.commands.bench_serve import VOCABULARY, Timing, model_name, request, server, stream
from vllm_di.commands.table import print_table
from vllm_di.components.device.system import cpu_name
from vllm_di.components.interfaces import ReplicaLoad
from vllm_di.components.messages import EngineRequest, SamplingParams
from vllm_di.components.router.prefix import PrefixRouter

CONCURRENCY, PROMPT, ANSWER = 32, 64, 64
"""Of the throughput: requests at a time, tokens of each prompt and answer."""
BEGINNINGS, SHARED, OWN, REQUESTS = 24, 256, 32, 240
"""Of the trace: different beginnings, their tokens, the tokens behind, requests in random order."""
BLOCKS = 640
"""Of 16 tokens, of the one big cache: it holds all beginnings and the running requests."""
ROUTERS = ("prefix", "least_loaded", "round_robin")
TRACE = ["model=tiny", "device.threads=1", "scheduler.max_num_seqs=8"]


def main() -> None:
    words = sys.argv[1:]
    rounds = int(option(words, "--rounds", "3"))
    count = int(option(words, "--requests", "32"))
    only = option(words, "--only", "")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{cpu_name()}, {cores} cores, load {load:.1f}\n")
    if only in ("", "router"):
        router_cost()
    if only in ("", "throughput"):
        throughput(words, rounds, count)
    if only in ("", "hits"):
        hits(words)
    print(f"\nload at the end: {os.getloadavg()[0]:.1f}")


def router_cost() -> None:
    """Microseconds of ``choose`` in a table that is full."""
    rows = []
    for replicas in (2, 8):
        loads = [ReplicaLoad(i, i % 3, 100 * i) for i in range(replicas)]
        for length in (100, 1_000, 4_000, 16_000):
            router = PrefixRouter()
            asked = [
                EngineRequest(request_id="r", prompt_token_ids=ids, params=SamplingParams())
                for ids in prompts(200, length, 32_000, seed=length)
            ]
            filler = EngineRequest(
                request_id="r", prompt_token_ids=[0] * 200, params=SamplingParams()
            )
            for number in range(5_000):
                filler.prompt_token_ids[0] = number
                router.choose(filler, loads)
            seconds = []
            for one in asked + asked[:100]:
                begin = time.perf_counter()
                router.choose(one, loads)
                seconds.append(time.perf_counter() - begin)
            seconds.sort()
            shown = [f"{1e6 * seconds[len(seconds) * p // 100]:.0f}" for p in (50, 90, 99)]
            rows.append([str(replicas), str(length), *shown])
    print("router=prefix, microseconds of a choice")
    print_table(["replicas", "tokens", "p50", "p90", "p99"], rows)


def throughput(words: Sequence[str], rounds: int, count: int) -> None:
    """Generated tokens a second of one replica and of two, and the processor time for each: on a
    busy machine that says more than the clock does."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    costs: dict[int, list[float]] = {1: [], 2: []}
    with contextlib.ExitStack() as stack:
        servers = {}
        for number in rates:
            before = set(psutil.Process().children())
            address = stack.enter_context(server(Arguments(overrides=_replicas(words, number))))
            servers[number] = address, set(psutil.Process().children()) - before
        for turn in range(-1, rounds):  # the first round does not count
            for number, (address, processes) in servers.items():
                asked = prompts(count, PROMPT, VOCABULARY, seed=turn + 1)
                begin = sum(map(_processor_seconds, processes))
                seconds = asyncio.run(_ask(address, asked, ANSWER))
                cost = sum(map(_processor_seconds, processes)) - begin
                if turn >= 0:
                    rates[number].append(count * ANSWER / seconds)
                    costs[number].append(1e3 * cost / (count * ANSWER))
    print(f"\n{count} requests of {PROMPT} + {ANSWER} tokens, {CONCURRENCY} at a time")
    rows = []
    for number, found in rates.items():
        shown = [f"{f(found):.0f}" for f in (statistics.median, min, max)]
        rows.append([str(number), *shown, f"{statistics.median(costs[number]):.2f}"])
    print_table(["replicas", "tokens/s", "min", "max", "processor ms a token"], rows)
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print(f"two to one, by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


def hits(words: Sequence[str]) -> None:
    """Share of prompt tokens found in the cache."""
    rows = [["1", "", str(BLOCKS), f"{_hit_rate([*TRACE, *words, *_blocks(BLOCKS)]):.3f}"]]
    for router in ROUTERS:
        overrides = [*TRACE, *words, "executor.data_parallel_size=2", f"router={router}"]
        rate = _hit_rate([*overrides, *_blocks(BLOCKS // 2)])
        rows.append(["2", router, f"2 x {BLOCKS // 2}", f"{rate:.3f}"])
    print(
        f"\n{REQUESTS} requests on {BEGINNINGS} beginnings of {SHARED} tokens, {OWN} more each, "
        "8 at a time; tokens found in the cache of those looked up"
    )
    print_table(["replicas", "router", "blocks", "hits"], rows)


def _replicas(words: Sequence[str], number: int) -> list[str]:
    return ["device.threads=1", *words, f"executor.data_parallel_size={number}"]


def _processor_seconds(process: psutil.Process) -> float:
    """Of a process and of those that it started."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def _blocks(count: int) -> list[str]:
    return [f"worker.num_blocks={count}"]


def _hit_rate(overrides: list[str]) -> float:
    draw = random.Random(7)
    beginnings = prompts(BEGINNINGS, SHARED, VOCABULARY, seed=1)
    tails = prompts(REQUESTS, OWN, VOCABULARY, seed=2)
    asked = [[*draw.choice(beginnings), *tail] for tail in tails]
    with server(Arguments(overrides=overrides)) as address:
        asyncio.run(_ask(address, asked, 8, concurrency=8))
        host, port = address.removeprefix("http://").split(":")
        text = asyncio.run(request(host, int(port), "GET", "/metrics"))[1].decode()
    found = {
        name: sum(
            map(float, re.findall(rf"^vllm:prefix_cache_{name}_total{{.*}} (\S+)", text, re.M))
        )
        for name in ("hits", "queries")
    }
    return found["hits"] / found["queries"]


async def _ask(
    address: str, asked: Sequence[list[int]], wanted: int, concurrency: int = CONCURRENCY
) -> float:
    """Seconds for all requests, ``concurrency`` at a time."""
    host, port = address.removeprefix("http://").split(":")
    model, gate = await model_name(host, int(port)), asyncio.Semaphore(concurrency)

    async def one(prompt: list[int]) -> None:
        timing = Timing()
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": wanted,
            "temperature": 0,
            "ignore_eos": True,
        }
        async with gate:
            await stream(host, int(port), body, timing)
        if timing.failed:
            raise RuntimeError(timing.failed)

    begin = time.perf_counter()
    await asyncio.gather(*map(one, asked))
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
