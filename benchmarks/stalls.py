"""A burst of prompts while others read, in seconds of the engine's processor time: a busy machine
changes them little, where the times of ``benchmarks.burst`` say nothing.

    python -m benchmarks.stalls [--values null,50,100,200] [--prompt 128] [overrides]

Four requests decode when sixteen more come at once; the engine runs in this process, on one
thread. The first of two rounds does not count.
"""

from __future__ import annotations

import statistics
import sys
import time

from benchmarks.burst import ANSWER, BEFORE, BURST, READERS, option, share
from vllm_di import LLM, SamplingParams
from vllm_di.commands.bench import prompts
from vllm_di.commands.table import print_table
from vllm_di.components.device.system import cpu_name
from vllm_di.components.engine.standard import StandardEngine


def main() -> None:
    words = sys.argv[1:]
    values = option(words, "--values", "null,50,100,200").split(",")
    length = int(option(words, "--prompt", "128"))
    rows = []
    for value in values:
        overrides = ["executor=inline", "device.threads=1", f"scheduler.max_step_ms={value}"]
        with LLM(overrides=["platform=cpu", *overrides, *words]) as llm:
            assert isinstance(llm.engine, StandardEngine)
            llm.engine.clock = time.process_time
            measure(llm, length, 0)
            rows.append([value, *(f"{figure:,.0f}" for figure in measure(llm, length, 1))])
    print(f"{READERS} readers, then {BURST} prompts of {length} tokens; {cpu_name()}, one thread\n")
    titles = ["max_step_ms", "ITL before p50", "ITL p50", "p99", "TTFT p50", "p99", "tok/s"]
    print_table(titles, rows)


def measure(llm: LLM, length: int, seed: int) -> list[float]:
    """-> milliseconds as the titles say, and tokens of all requests a second from the burst on."""
    ids = prompts(READERS + BURST, length, 40_000, seed)
    times: dict[str, list[float]] = {}

    def start(some: list[list[int]], count: int) -> list[str]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        names = []
        for prompt in some:
            generation = llm._start(prompt, params, False)
            llm._add(generation)
            names += [request.request_id for request in generation.requests]
        times.update((name, []) for name in names)
        return names

    def run(names: list[str], count: int) -> None:
        while any(len(times[name]) < count for name in names):
            for output in llm.engine.step().outputs:
                times[output.request_id] += [time.process_time()] * len(output.token_ids)

    readers = start(ids[:READERS], 400)
    run(readers, BEFORE)
    begin = time.process_time()
    late = start(ids[READERS:], ANSWER)
    run(late, ANSWER)
    seconds = time.process_time() - begin
    for name in readers:
        llm.engine.abort(name)
    last = max(times[name][0] for name in late)
    gaps = [pair for n in readers for pair in zip(times[n], times[n][1:], strict=False)]
    steady = [1e3 * (b - a) for a, b in gaps if b < begin]
    stalls = sorted(1e3 * (b - a) for a, b in gaps if b >= begin and a < last)
    first = sorted(1e3 * (times[name][0] - begin) for name in late)
    tokens = sum(at >= begin for stamps in times.values() for at in stamps)
    return [
        statistics.median(steady),
        *(share(stalls, part) for part in (50, 99)),
        *(share(first, part) for part in (50, 99)),
        tokens / seconds,
    ]


if __name__ == "__main__":
    main()
