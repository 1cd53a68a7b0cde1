"""What the parts cost inside vLLM: start and decode of stock vLLM and of ours, in turns in one run.

``python -m benchmarks.vllm_cost [--vllm 0.32.0] [--modes eager,compiled]`` (``make bench-vllm``)
runs in the environment of ``make vllm-env``. Each engine is a process of its own with one thread;
all of a mode live at once and decode in turns. A figure is the processor seconds of that process,
which a loaded machine disturbs less than the clock; with it, the clock's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from tests.vllm.environment import VERSIONS, interpreter, variables
from tests.vllm.model import smollm2

from vllm_di.commands.table import print_table
from vllm_di.components.device.system import cpu_name
from vllm_di.vllm import versions

CONFIGS: dict[str, list[str] | None] = {
    "stock": None,
    "nothing set": [],
    "vLLM's own parts": ["attention=vllm/cpu_attn", "scheduler=vllm/async"],
    "all of ours": ["attention=paged", "ops=cpu", "quantization=none"],
}
"""Name to overrides; None is vLLM without this project's plugin."""
BATCHES = (1, 8)
PROMPT, STEPS = 16, 24
Seconds = tuple[float, float]
"""(processor, clock)."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.vllm_cost")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm", type=int, default=1, help="rounds that fill caches")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--vllm", default=VERSIONS[0], help="the version")
    arguments = parser.parse_args()
    if versions.installed() is None:  # this is the project's own environment
        line = [str(interpreter(arguments.vllm)), "-m", "benchmarks.vllm_cost", *sys.argv[1:]]
        environment = {**os.environ, **variables(arguments.vllm), "OMP_NUM_THREADS": "1"}
        sys.exit(subprocess.run(line, env=environment, check=False).returncode)
    model = str(smollm2())
    title = f"vLLM {versions.installed()}, {cpu_name()}, one thread, {arguments.dtype}"
    head = ["figure", "config", "ms", "ratio to stock", "from", "to", "ratio by the clock"]
    for mode in arguments.modes.split(","):
        found: dict[tuple[str, str], dict[str, list[Seconds]]] = {}
        for _ in range(arguments.warm):
            turns(model, mode, arguments.dtype, 0)
        for _ in range(arguments.rounds):
            for key, values in turns(model, mode, arguments.dtype, arguments.turns).items():
                for name, seconds in values.items():
                    found.setdefault(key, {}).setdefault(name, []).extend(seconds)
        print(f"{title}, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}\n")
        print_table(head, [row for key, values in found.items() for row in rows(key, values)])


def rows(key: tuple[str, str], values: dict[str, list[Seconds]]) -> list[list[str]]:
    """A figure's lines: ratios are of neighbours in one turn."""
    lines = []
    for name, seconds in values.items():
        pairs = list(zip(seconds, values["stock"], strict=True))
        ratios = [ours[0] / stock[0] for ours, stock in pairs]
        clock = statistics.median(ours[1] / stock[1] for ours, stock in pairs)
        middle = 1e3 * statistics.median(s[0] for s in seconds)
        spread = [f"{f(ratios):.3f}" for f in (statistics.median, min, max)]
        lines.append([", ".join(key), name, f"{middle:,.1f}", *spread, f"{clock:.3f}"])
    return lines


def turns(
    model: str, mode: str, dtype: str, count: int
) -> dict[tuple[str, str], dict[str, list[Seconds]]]:
    """Start all engines, decode in turns, end them."""
    context = multiprocessing.get_context("spawn")
    engines: dict[str, tuple[Any, Connection]] = {}
    found: dict[tuple[str, str], dict[str, list[Seconds]]] = {}
    try:
        for name, overrides in CONFIGS.items():
            near, far = context.Pipe()
            os.environ["VLLM_PLUGINS"] = "" if overrides is None else "vllm_di"
            process = context.Process(
                target=engine, args=(far, model, overrides or [], mode, dtype), daemon=True
            )
            process.start()
            far.close()
            engines[name] = process, near
            found.setdefault((mode, "start"), {})[name] = [near.recv()]
        for turn in range(count + 1 if count else 0):
            for batch in BATCHES:
                names = list(engines)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    near = engines[name][1]
                    near.send(batch)
                    seconds = near.recv()
                    if turn:  # the first is not counted
                        key = mode, f"decode a step, batch {batch}"
                        found.setdefault(key, {}).setdefault(name, []).append(seconds)
    finally:
        for process, _ in engines.values():
            process.kill()
            process.join()
    return found


def engine(far: Connection, model: str, overrides: list[str], mode: str, dtype: str) -> None:
    """One engine: tells how long it took to start, then decodes the batch that it is sent."""
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    begin = time.process_time(), time.perf_counter()
    from vllm import LLM, SamplingParams

    more: dict[str, Any] = {"additional_config": {"vllm_di": overrides}} if overrides else {}
    llm = LLM(
        model,
        dtype=dtype,
        enforce_eager=mode == "eager",
        max_model_len=256,
        max_num_seqs=max(BATCHES),
        seed=0,
        **more,
    )
    far.send((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    params = SamplingParams(temperature=0, max_tokens=STEPS + 8, ignore_eos=True, detokenize=False)
    core, turn = llm.llm_engine, 0
    while True:
        batch = far.recv()
        turn += 1
        for index in range(batch):
            ids = [(31 * index + 17 * i + 7 * turn) % 900 + 10 for i in range(PROMPT)]
            core.add_request(f"{turn}-{index}", {"prompt_token_ids": ids}, params)
        for _ in range(3):  # prefill, and what runs ahead
            core.step()
        begin = time.process_time(), time.perf_counter()
        for _ in range(STEPS):
            core.step()
        took = time.process_time() - begin[0], time.perf_counter() - begin[1]
        while core.has_unfinished_requests():
            core.step()
        far.send((took[0] / STEPS, took[1] / STEPS))


if __name__ == "__main__":
    main()
