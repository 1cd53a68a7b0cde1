"""An engine on a node: ``python -m tests.ray.ask JOBS``. A line for each job on standard output:
``OUT`` and JSON of its tokens, or of the error."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

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
        found: dict[str, Any] = {"tokens": tokens(llm)}
        if job.get("listening"):
            found["ours"] = [[p.address, p.port] for p in listening({os.getpid()})]
            found["ray"] = sorted({p.address for p in listening(processes_of("raylet"))})
        if "listening_on" in job:  # workers of a node
            workers = below(job["listening_on"], "ray::NodeWorker")
            found["theirs"] = [address for worker in workers for address in offers(worker.pid)]
        if "harm" in job:
            found |= harmed(llm, *job["harm"])
        if "lose" in job:  # and go on
            for process in below(job["lose"], "ray::NodeWorker"):
                os.kill(process.pid, signal.SIGKILL)
            found["after"] = tokens(llm)
    return found


def tokens(llm: LLM) -> list[list[int]]:
    return [list(a.outputs[0].token_ids) for a in llm.generate(PROMPTS, GREEDY)]


def harmed(llm: LLM, what: str, *rest: Any) -> dict[str, Any]:
    """Do harm, and see what the engine says of it, how many seconds later: ``run`` a command, or
    kill what has a mark in its command line below the process of a node."""
    if what == "run":
        subprocess.run(rest, check=True)
    else:
        for process in below(rest[0], what):
            for one in [process, *process.children(recursive=True)]:
                with suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)
    begin = time.monotonic()
    while time.monotonic() - begin < 60:
        try:
            llm.engine.check_alive()
        except VllmDiError as error:
            text = str(error)
            return {"error": type(error).__name__, "text": text, "s": time.monotonic() - begin}
        time.sleep(0.05)
    return {"text": "nothing was noticed"}


def offers(pid: int) -> list[str]:
    """IPv4 addresses that a process of any network namespace listens on."""
    own = {os.readlink(name) for name in Path(f"/proc/{pid}/fd").iterdir()}
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
            found.append(socket.inet_ntoa(bytes.fromhex(fields[1].split(":")[0])[::-1]))
    return found


def below(pid: int, mark: str) -> list[psutil.Process]:
    """Descendants of a process with a mark in their command line."""
    children = psutil.Process(pid).children(recursive=True)
    found = [process for process in children if mark in " ".join(process.cmdline())]
    assert found, [process.cmdline() for process in children]
    return found


if __name__ == "__main__":
    main()
