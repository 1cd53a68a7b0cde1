"""The commands of the pages that take a while, to their end: ``make test-docs``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from tests.docs.blocks import blocks, commands_that
from tests.docs.test_blocks import words_of
from tests.server.served import started

pytestmark = [pytest.mark.docs, pytest.mark.timeout(600)]

SERVERS = [c for c in commands_that("slow") if words_of(c)[:2] == ["vllm-di", "serve"]]
OTHERS = [c for c in commands_that("slow") if c not in SERVERS]
PORT = "http://127.0.0.1:8000"


def environment() -> dict[str, str]:
    """The reader's: our commands on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path}


@contextlib.contextmanager
def served(command: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server as the page starts it, but on a free port: its address, once it is ready."""
    with started(words_of(command)[1:], environment()) as found:
        yield found


def ask(address: str) -> str:
    model = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize("command", SERVERS)
def test_server(command: str) -> None:
    if "device.cores" in command and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two cores")
    with served(command) as (address, _):
        assert "Paris" in ask(address)


def input_files(folder: Path) -> None:
    """docs/batch.md: the file of requests."""
    (block,) = [b for b in blocks() if b.page == "docs/batch.md" and b.language == "json"]
    (folder / "requests.jsonl").write_text(f"{block.text}\n")


@pytest.mark.parametrize("command", [c for c in OTHERS if not c.startswith("kill")])
def test_command(command: str, tmp_path: Path) -> None:
    input_files(tmp_path)
    line = command.replace(".venv/bin/", "")
    with contextlib.ExitStack() as stack:
        if PORT in line:
            address, _ = stack.enter_context(served("vllm-di serve model=tiny platform=cpu"))
            line = line.replace(PORT, address)
        if "run-batch -" in line or " bench " in line:
            line = _smaller(line)
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    if "results.jsonl" in command:
        results = (tmp_path / "results.jsonl").read_text().splitlines()
        assert [json.loads(row)["response"]["status_code"] for row in results] == [200, 200]
    else:
        assert done.stdout


def _smaller(line: str) -> str:
    """A measurement need not be a good one here: one run each, with fewer prompts."""
    if " bench latency" in line:
        return f"{line} --warmup 0 --repeats 1"
    return re.sub(r"--num-prompts \d+", "--num-prompts 8", line)


def test_new_engines_while_it_serves() -> None:
    """docs/clusters.md: ``kill -USR1 PID``."""
    command = next(c for c in SERVERS if c.endswith("data_parallel_size=2"))
    with served(command) as (address, process):
        before = engines(process.pid)
        process.send_signal(signal.SIGUSR1)
        until = time.monotonic() + 240
        while time.monotonic() < until and engines(process.pid) & before:
            assert "Paris" in ask(address)
            time.sleep(0.5)
        assert not engines(process.pid) & before
        assert len(engines(process.pid)) == 2


def engines(server: int) -> set[int]:
    """Process ids of the engines of a server."""
    return {child.pid for child in psutil.Process(server).children()}
