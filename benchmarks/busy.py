"""Decoding while another process keeps one of the cores busy, against a quiet machine: the threads
of a step wait for each other, and one of them shares its core.

    python -m benchmarks.busy [overrides]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.figures import report
from vllm_di import LLM, SamplingParams
from vllm_di.components.device.system import cpu_name, usable_cores

TOKENS = 24
ROUNDS = 5
MODELS = ("tiny", "smollm2")
SPIN = "import os, sys; os.sched_setaffinity(0, [int(sys.argv[1])])\nwhile True: pass"


def main() -> None:
    """As many threads as cores, at least two; the busy core is the last."""
    threads = max(2, usable_cores())
    overrides = ["executor=inline", f"device.threads={threads}", *sys.argv[1:]]
    rows: dict[str, list[float]] = {}
    for model in MODELS:
        quiet, busy = [], []
        with LLM(model, overrides=["platform=cpu", *overrides]) as llm:
            decode(llm)
            for _ in range(ROUNDS):
                quiet.append(decode(llm))
                with busy_core():
                    busy.append(decode(llm))
        rows[f"{model}: quiet, ms"] = quiet
        rows[f"{model}: one core busy, ms"] = busy
        pairs = zip(busy, quiet, strict=True)
        rows[f"{model}: busy / quiet of a round"] = [b / q for b, q in pairs]
    report(
        f"{TOKENS} tokens on {threads} threads, one of {usable_cores()} cores kept busy "
        f"({cpu_name()}, load {os.getloadavg()[0]:.1f}); aim: 2.5 times",
        rows,
    )


def decode(llm: LLM) -> float:
    """-> milliseconds."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    begin = time.perf_counter()
    llm.generate([[1, 2, 3]], params)
    return 1e3 * (time.perf_counter() - begin)


@contextmanager
def busy_core() -> Iterator[None]:
    """A process that computes on the last core of this one's, and nothing else."""
    core = max(os.sched_getaffinity(0))
    process = subprocess.Popen([sys.executable, "-c", SPIN, str(core)])
    time.sleep(0.2)  # it starts
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
