"""An engine on a node: ``python -m tests.ray.ask JOBS``. A line for each job on standard output:
``OUT`` and JSON of its tokens, or of the error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vllm_di import LLM, SamplingParams
from vllm_di.components.listening import listening, processes_of
from vllm_di.errors import VllmDiError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["a", "hello world", "x" * 70]


def main() -> None:
    for job in json.loads(sys.argv[1]):
        try:
            found = do(job)
        except VllmDiError as error:
            found = {"error": type(error).__name__, "text": str(error)}
        sys.stdout.write(f"OUT {json.dumps(found)}\n")
        sys.stdout.flush()


def do(job: dict[str, Any]) -> dict[str, Any]:
    with LLM("tiny", overrides=job["overrides"], config_dirs=job.get("config_dirs", [])) as llm:
        tokens = [list(a.outputs[0].token_ids) for a in llm.generate(PROMPTS, GREEDY)]
        found: dict[str, Any] = {"tokens": tokens}
        if job.get("listening"):
            found["ours"] = [[p.address, p.port] for p in listening({os.getpid()})]
            found["ray"] = sorted({p.address for p in listening(processes_of("raylet"))})
        if "harm" in job:
            found |= harmed(llm, job["harm"])
    return found


def harmed(llm: LLM, harm: list[str]) -> dict[str, Any]:
    """Do harm, and see what the engine says of it, how many seconds later."""
    what, *rest = harm
    if what == "run":
        subprocess.run(rest, check=True)
    else:
        for pid in elsewhere(what):
            os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    while time.monotonic() - begin < 60:
        try:
            llm.engine.check_alive()
        except VllmDiError as error:
            text = str(error)
            return {"error": type(error).__name__, "text": text, "s": time.monotonic() - begin}
        time.sleep(0.05)
    return {"text": "nothing was noticed"}


def elsewhere(mark: str) -> list[int]:
    """Processes with a mark in their command line, in another network namespace that is joined to
    this one: the tests' other nodes have names that begin alike."""
    own = os.readlink("/proc/self/ns/net")
    prefix = os.environ["VDI_NODES"]
    others = set()
    for name in Path("/run/netns").iterdir():
        if name.name.startswith(prefix):
            done = subprocess.run(
                ["ip", "netns", "pids", name.name], capture_output=True, text=True
            )
            others |= {int(pid) for pid in done.stdout.split()}
    return [pid for pid in processes_of(mark) & others if os.readlink(f"/proc/{pid}/ns/net") != own]


if __name__ == "__main__":
    main()
