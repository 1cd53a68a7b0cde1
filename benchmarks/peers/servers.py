"""Servers as users start them; the client is ``vllm-di bench serve`` for all."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.peers import environments as at
from benchmarks.peers import works
from benchmarks.peers.environments import SetupError
from benchmarks.peers.processes import Processes

START_SECONDS = 400.0


class Server:
    """One server on a port of its own."""

    def __init__(self, name: str, environment: str, command: Callable[[int], list[str]]) -> None:
        self.name, self._environment, self._command = name, environment, command
        self._processes: Processes | None = None
        self._base = ""

    def start(self) -> float:
        """Seconds from the command to the first token. A server that runs is ended before. Raises
        SetupError."""
        self.close()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self._base = f"http://127.0.0.1:{port}"
        command = self._command(port)  # what it needs is set up before the clock starts
        with tempfile.TemporaryFile("w+") as log:
            begin = time.perf_counter()
            self._processes = Processes(command, self._environment, stdout=log, stderr=log)
            while not self._answers():
                if self._processes.main.poll() is not None:
                    log.seek(0)
                    raise SetupError((log.read().strip().splitlines() or ["no message"])[-1])
                if time.perf_counter() - begin > START_SECONDS:
                    raise SetupError(f"no answer within {START_SECONDS:.0f} s")
                time.sleep(0.02)
            return time.perf_counter() - begin

    @property
    def group(self) -> int:
        """The process group of the server that was started."""
        assert self._processes is not None
        return self._processes.main.pid

    def measure(self, seed: int) -> dict[str, float]:
        """Figures of one round by their names in ``bench serve``."""
        assert self._processes is not None
        numbers = {
            "--num-prompts": works.SERVER_REQUESTS,
            "--input-len": works.SERVER_GIVEN,
            "--output-len": works.SERVER_NEW,
            "--concurrency": works.SERVER_AT_ONCE,
            "--repeats": 1,
            "--warmup": 0,
            "--seed": seed,
        }
        with tempfile.TemporaryDirectory() as folder, self._processes.turn():
            file = Path(folder) / "result.json"
            words = [word for name, value in numbers.items() for word in (name, str(value))]
            command = [sys.executable, "-m", "vllm_di.cli", "bench", "serve", *words]
            command += ["--base-url", self._base, "--json", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SetupError((done.stderr.strip().splitlines() or ["no message"])[-1])
            runs = json.loads(file.read_text())["runs"]
        return {name: values[0] for name, values in runs.items()}

    def pause(self) -> None:
        """Until it is measured."""
        if self._processes is not None:
            with self._processes.turn():
                pass

    def close(self) -> None:
        if self._processes is not None:
            self._processes.end(kindly=False)
            self._processes = None

    def _answers(self) -> bool:
        body = json.dumps({"prompt": "Hello", "max_tokens": 1, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._base}/v1/completions", body, headers)
        try:
            urllib.request.urlopen(request).read()
        except (urllib.error.URLError, ConnectionError):
            return False
        return True


def of(weights: str) -> list[Server]:
    """Ours first. There is no 4-bit row: none of the others serves the shipped file."""

    def ours(option: str) -> Server:
        command = [sys.executable, "-m", "vllm_di.cli", "serve", f"quantization={option}"]
        return Server("vllm-di", "ours", lambda port: [*command, f"server.port={port}"])

    def vllm(port: int) -> list[str]:
        tool = at.python("vllm").parent / "vllm"
        return [str(tool), "serve", str(at.folder_bf16()), "--dtype=bfloat16", f"--port={port}"]

    if weights == "bf16":
        return [ours("none"), Server("vLLM", "vllm", vllm)]
    return [ours("int8")] if weights == "int8" else []


@contextlib.contextmanager
def chosen(weights: str, only: set[str]) -> Iterator[list[Server]]:
    servers = [s for s in of(weights) if not only or s.name in only]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()
