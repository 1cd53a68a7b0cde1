"""A server with a tiny model on loopback, for rigs: started, watched, asked for the canary."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

JSON = {"content-type": "application/json"}
CANARY = {"prompt": "canary", "max_tokens": 8, "temperature": 0, "logprobs": 3, "ignore_eos": True}
START_SECONDS = 180.0


class RigServer:
    """``vllm-di serve model=tiny`` in a process of its own; its log is in ``log``."""

    def __init__(self, overrides: Sequence[str] = ()) -> None:
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="rig-")
        self.log = Path(self._folder.name) / "log"
        command = [sys.executable, "-m", "vllm_di.cli", "serve", "model=tiny", "tokenizer=bytes"]
        command += ["chat_template=plain", f"server.port={self.port}", *overrides]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def __enter__(self) -> RigServer:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.ask("GET", "/readyz")[0] == 200:
                    self.engines = children(self.process.pid)
                    self.expected = self.canary()
                    return self
            except OSError:
                pass
            time.sleep(0.1)
        text = self.log.read_text(errors="replace")[-2000:]
        self.close()
        raise RuntimeError(f"the server did not start:\n{text}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._folder.cleanup()

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, JSON if body is not None else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def canary(self) -> Any:
        """The same question, whose answer must always be the same."""
        status, body = self.ask("POST", "/v1/completions", json.dumps(CANARY).encode())
        assert status == 200, f"the canary got {status}: {body[:300]!r}"
        return json.loads(body)["choices"]

    def check(self) -> None:
        """Raises AssertionError when a process has died or the canary's answer has changed."""
        assert self.process.poll() is None, f"the server ended: {self.tail()}"
        assert children(self.process.pid) == self.engines, f"an engine died: {self.tail()}"
        answer = self.canary()
        assert answer == self.expected, f"the canary's answer changed: {answer}"

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def children(pid: int) -> list[int]:
    """Processes that a process has started and that live."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return sorted(child for child in found if _lives(child))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
