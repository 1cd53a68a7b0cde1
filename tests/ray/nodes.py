"""A Ray cluster of several nodes on this machine: each in a network namespace of its own, with an
address, a folder for Ray's files and, where a test wants it, packages and secrets of its own. Where
namespaces are not allowed, several raylets on this one host: what wants the others is skipped."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
TINY = ["platform=cpu", "model.dtype=float32"]
START_SECONDS = 120
STORE_BYTES = 80_000_000
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def reason_against() -> str:
    """Why there can be no cluster here; nothing where there can."""
    return "" if find_spec("ray") else "ray is not installed"


def reason_for_one_host() -> str:
    """Why nodes cannot have a network of their own here; nothing where they can."""
    if os.environ.get("VDI_ONE_HOST"):
        return "VDI_ONE_HOST is set"
    name = f"vdi{os.getpid()}x"
    try:
        run("ip", "netns", "add", name)
        run("ip", "link", "add", f"{name}0", "type", "veth", "peer", "name", f"{name}1")
        run("ip", "link", "del", f"{name}0")
        run("ip", "netns", "del", name)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip()
        return f"no network namespaces: {said}"
    return ""


class Nodes:
    """The head is ``a``; ``add`` starts others, by a number of their own from 2. Everything ends
    with ``close``."""

    def __init__(self) -> None:
        self.why_one_host = reason_for_one_host()
        self.folder = Path(tempfile.mkdtemp(prefix="vdi"))
        self.token = self._file("token", secrets.token_hex(32).encode())
        self.secret = self._file("secret", secrets.token_hex(32).encode())
        self.started: dict[str, subprocess.Popen[str]] = {}
        (self.folder / "ray").mkdir()
        self.head = self.address_of(1)
        if self.why_one_host:
            with socket.create_server((self.head, 0)) as probe:
                port = probe.getsockname()[1]
        else:
            port = 6379
            run("ip", "netns", "add", self.name("a"))
            self.ip("a", "link", "set", "lo", "up")
        self.address = f"{self.head}:{port}"
        self._port = port

    def address_of(self, number: int) -> str:
        # 127.0.0.1 would become the address that leads to the internet
        return "127.0.0.2" if self.why_one_host else f"10.231.7.{number}"

    def _file(self, name: str, text: bytes) -> Path:
        path = self.folder / name
        path.touch(0o600)
        path.write_bytes(text)
        return path

    def name(self, node: str) -> str:
        return f"vdi{os.getpid()}{node}"

    def ip(self, node: str, *arguments: str) -> None:
        run("ip", "-n", self.name(node), *arguments)

    @property
    def environment(self) -> dict[str, str]:
        known = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return known | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "OMP_NUM_THREADS": "1",
        }

    def popen(self, node: str, command: Sequence[str], **more: Any) -> subprocess.Popen[str]:
        inside = [] if self.why_one_host else ["ip", "netns", "exec", self.name(node)]
        options = {"env": self.environment} | more
        return subprocess.Popen([*inside, *command], cwd=ROOT, text=True, **options)

    def start_head(self) -> None:
        options = ["--head", f"--port={self._port}", "--include-dashboard=false", "--num-cpus=1"]
        options += ['--resources={"tokens": 1}']
        options += [f"--temp-dir={self.folder}/ray"]
        if not self.why_one_host:
            # its first peer's link is there before: without one the address is on no interface
            self._link("b", 2)
        self._ray("a", 1, options)

    def _link(self, node: str, number: int) -> None:
        run("ip", "netns", "add", self.name(node))
        self.ip(node, "link", "set", "lo", "up")
        ours, theirs = f"vdi-{node}", "eth0"
        pair = ["link", "add", ours, "type", "veth", "peer", "name", theirs]
        self.ip("a", *pair, "netns", self.name(node))
        self.ip("a", "addr", "add", self.head, "peer", self.address_of(number), "dev", ours)
        self.ip(node, "addr", "add", self.address_of(number), "peer", self.head, "dev", theirs)
        self.ip("a", "link", "set", ours, "up")
        self.ip(node, "link", "set", theirs, "up")

    def add(
        self,
        node: str,
        number: int,
        *options: str,
        python_path: Path | None = None,
        other_files: Mapping[Path, Path] | None = None,
    ) -> None:
        """``python_path``: before all packages of this one; ``other_files``: what this node has at
        the path of a file, in a network of its own alone."""
        before = ""
        if not self.why_one_host:
            if number != 2:
                self._link(node, number)
            own = self.folder / node
            own.mkdir()
            mounts = {self.folder / "ray": own} | dict(other_files or {})
            before = "".join(f"mount --bind {x} {at} && " for at, x in mounts.items())
        environment = self.environment
        if python_path is not None:
            environment["PYTHONPATH"] = str(python_path)
        options = (f"--address={self.address}", *options)
        self._ray(node, number, options, before=before, env=environment)

    def _ray(
        self, node: str, number: int, options: Sequence[str], before: str = "", **more: Any
    ) -> None:
        store = f"--object-store-memory={STORE_BYTES}"
        command = [*RAY, store, f"--node-ip-address={self.address_of(number)}", *options]
        log = self.folder / f"{node}.log"
        script = before + 'exec "$@"'
        with log.open("w") as out:
            process = self.popen(
                node, ["sh", "-c", script, "sh", *command], stdout=out, stderr=out, **more
            )
        self.started[node] = process
        end = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    def ask(self, *jobs: dict[str, Any], node: str = "a", seconds: float = 280) -> list[Any]:
        """Run jobs of ``tests/ray/ask.py`` one after the other on a node; what came of each, and
        under ``log`` what was said meanwhile."""
        command = [sys.executable, "-m", "tests.ray.ask", json.dumps(jobs)]
        process = self.popen(node, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
        found = [json.loads(x[len("OUT ") :]) for x in out.splitlines() if x.startswith("OUT ")]
        assert len(found) == len(jobs), out[-3000:] + errors[-5000:]
        return [answer | {"log": errors} for answer in found]

    def pids(self, node: str) -> list[int]:
        """All processes of a node's raylet, those of workers included."""
        process = psutil.Process(self.started[node].pid)
        return [process.pid, *(child.pid for child in process.children(recursive=True))]

    def kill(self, node: str) -> None:
        """As a machine that loses its power."""
        for pid in self.pids(node)[::-1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self, node: str) -> None:
        """End all processes of a node, and its namespace."""
        if node in self.started:
            with suppress(psutil.NoSuchProcess):
                self.kill(node)
            self.started.pop(node).wait(30)
        if not self.why_one_host:
            # those that were left behind by their parents
            done = subprocess.run(
                ["ip", "netns", "pids", self.name(node)], capture_output=True, text=True
            )
            for line in done.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(line), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self.name(node)], capture_output=True)

    def close(self) -> None:
        for node in [*list(self.started)[::-1], "b", "a"]:
            self.stop(node)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Each has a CPU; the head has ``tokens`` too, and ``b`` ``prompts``."""
    nodes = Nodes()
    try:
        nodes.start_head()
        nodes.add("b", 2, "--num-cpus=1", '--resources={"prompts": 1}')
        yield nodes
    finally:
        nodes.close()
