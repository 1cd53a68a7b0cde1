"""Time to the first token of a long prompt that is handed over, beside one that is not, and what
of it the hand-over of each chunk takes.

    python -m benchmarks.handover [--prompt 2000] [--chunk 256] [--rounds 3] [overrides]

Three engines take turns: ``platform=cpu`` alone, ``platform=split_cpu_cpu`` as it is, and the same
where the next chunk waits until the one before has crossed. Last, what a hand-over layer by layer
could save at most: the crossing of the last chunk, behind which no other runs.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.burst import option
from vllm_di.commands.table import print_table
from vllm_di.components.device.system import cpu_name
from vllm_di.components.executor import disaggregated
from vllm_di.components.executor.lanes import Lane
from vllm_di.components.interfaces import Engine
from vllm_di.components.messages import EngineRequest, SamplingParams
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import Launcher, opened
from vllm_di.containers.slots import EngineContainer

MODEL = ["model=smollm2", "model.dtype=float32", "kv_cache_manager.prefix_caching=false"]
ALONE = ["platform=cpu", "scheduler=continuous"]
SPLIT = ["platform=split_cpu_cpu", "executor.processes=true"]
TIMED = ("execute", "offer", "take")
"""Calls of a lane: a step, copying its blocks out, writing them on the other side."""


def main() -> None:
    words = sys.argv[1:]
    length, chunk = int(option(words, "--prompt", "2000")), int(option(words, "--chunk", "256"))
    rounds = int(option(words, "--rounds", "3"))
    print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    more = [*MODEL, f"scheduler.max_num_batched_tokens={chunk}", *words]
    calls: dict[str, list[float]] = {name: [] for name in TIMED}
    seconds: dict[str, list[float]] = {}
    for index in range(rounds):
        prompt = prompt_of(length, index)
        seconds.setdefault("platform=cpu", []).append(first_token([*ALONE, *more], prompt))
        with timed(calls):
            seconds.setdefault("split", []).append(first_token([*SPLIT, *more], prompt))
        with one_step_ahead():
            waiting = first_token([*SPLIT, *more], prompt)
        seconds.setdefault("split, without overlap", []).append(waiting)
    rows = [
        [name, f"{statistics.median(found):.3f}", f"{min(found):.3f}", f"{max(found):.3f}"]
        for name, found in seconds.items()
    ]
    print_table([f"{length} tokens in chunks of {chunk}", "median s", "least", "most"], rows)
    print_table(
        ["of each chunk", "median ms"],
        [[name, f"{1000 * statistics.median(found):.1f}"] for name, found in calls.items()],
    )
    tail = sum(statistics.median(calls[name]) for name in ("offer", "take"))
    share = tail / statistics.median(seconds["split"])
    print(f"layer by layer would save {1000 * tail:.1f} ms at most, {share:.1%} of the first token")


def prompt_of(length: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1000, 40_000) for _ in range(length)]


def first_token(overrides: Sequence[str], prompt: list[int]) -> float:
    """Seconds from the request to its first token, after a short one that warms up."""
    assembly = assemble(overrides)
    with opened(EngineContainer, assembly, launcher=Launcher(assembly)) as container:
        engine = container.engine()
        answer(engine, prompt[:40])
        begin = time.perf_counter()
        answer(engine, prompt)
        return time.perf_counter() - begin


def answer(engine: Engine, prompt: list[int]) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.add(EngineRequest(request_id="one", prompt_token_ids=prompt, params=params))
    while engine.has_work():
        engine.step()


@contextmanager
def timed(calls: dict[str, list[float]]) -> Iterator[None]:
    """Note how long each call of a lane takes."""
    plain: dict[str, Callable[..., Any]] = {name: getattr(Lane, name) for name in TIMED}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return plain[name](*args, **kwargs)
            finally:
                calls[name].append(time.perf_counter() - begin)

        return call

    for name in TIMED:
        setattr(Lane, name, watched(name))
    try:
        yield
    finally:
        for name, method in plain.items():
            setattr(Lane, name, method)


@contextmanager
def one_step_ahead() -> Iterator[None]:
    """No step is sent before the one before it has crossed."""
    before = disaggregated.STEPS_AHEAD
    disaggregated.STEPS_AHEAD = 1
    try:
        yield
    finally:
        disaggregated.STEPS_AHEAD = before


if __name__ == "__main__":
    main()
