"""Where an engine's memory goes, beside its KV cache: ``python -m benchmarks.memory [--server]``.

Proportional set size of all its processes by what is mapped, after a prompt of 128 tokens, with a
cache of 8 blocks (6 MB), which counts too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.peers.processes import Processes
from benchmarks.peers.servers import Server
from vllm_di.commands.table import print_table

WEIGHTS = {"bf16": "none", "int8": "int8", "4-bit": "gguf"}
"""Names of the columns to ``quantization``; the 4 bits are those of the shipped file."""
SMALL = ["platform=cpu", "worker.num_blocks=8", "model.max_model_len=256", "device.threads=2"]
KINDS = ["torch", "other libraries", "files", "heap", "anonymous", "other"]
HEADER = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)")
CHILD = """
import sys
from vllm_di import LLM, SamplingParams
with LLM(overrides=["executor=inline", *sys.argv[1:]]) as llm:
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.generate([list(range(100, 228))], params)
    print("ready", flush=True)
    sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", action="store_true", help="a server, with its API process")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    measure = of_server if options.server else of_library
    found = {
        name: measure([*SMALL, f"quantization={value}", *options.overrides])
        for name, value in WEIGHTS.items()
    }
    rows = [[kind, *(f"{f[kind] / 1e6:.0f}" for f in found.values())] for kind in KINDS]
    rows.append(["all", *(f"{f.total() / 1e6:.0f}" for f in found.values())])
    print_table(["MB", *found], rows)


def of_library(overrides: list[str]) -> Counter[str]:
    """Of one process, which has the engine in it."""
    command = [sys.executable, "-c", CHILD, *overrides]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = Processes(command, "ours", **pipes)
    assert processes.main.stdin is not None and processes.main.stdout is not None
    if processes.main.stdout.readline() != "ready\n":
        raise SystemExit(f"it ended with status {processes.main.wait()}")
    sizes = mapped(processes.main.pid)
    processes.main.stdin.close()
    processes.end(kindly=True)
    return sizes


def of_server(overrides: list[str]) -> Counter[str]:
    """Of a server's processes, after its first answer."""
    server = Server("vllm-di", "ours", lambda port: _command(port, overrides))
    server.start()
    sizes = mapped(server.group)
    server.close()
    return sizes


def _command(port: int, overrides: list[str]) -> list[str]:
    return [sys.executable, "-m", "vllm_di.cli", "serve", f"server.port={port}", *overrides]


def mapped(group: int) -> Counter[str]:
    """Kind of mapping to bytes, of all processes of a process group."""
    sizes: Counter[str] = Counter()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if os.getpgid(int(folder.name)) == group:
                add_sizes((folder / "smaps").read_text(), sizes)
        except OSError:  # it ended meanwhile
            continue
    return sizes


def add_sizes(smaps: str, sizes: Counter[str]) -> None:
    kind = KINDS[-1]
    for line in smaps.splitlines():
        if header := HEADER.fullmatch(line):
            kind = kind_of(header[1])
        elif line.startswith("Pss:"):
            sizes[kind] += 1024 * int(line.split()[1])


def kind_of(name: str) -> str:
    """Of a mapping, by its file's path."""
    if not name or name.startswith("[anon"):
        return "anonymous"
    if name.startswith("["):
        return "heap" if name == "[heap]" else "other"
    if "/torch/" in name:
        return "torch"
    return "other libraries" if ".so" in name or "/bin/python" in name else "files"


if __name__ == "__main__":
    main()
