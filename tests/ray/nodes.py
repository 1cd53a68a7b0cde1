"""A Ray cluster of several nodes on this machine: each in a network namespace of its own, with an
address, a folder for Ray's files and, where a test wants it, packages and secrets of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PORT = 6379
START_SECONDS = 120
STORE_BYTES = 80_000_000
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def reason_against() -> str:
    """Why there can be no nodes here; nothing where there can."""
    try:
        import ray  # noqa: F401
    except ImportError:
        return "ray is not installed"
    name = f"vdi{os.getpid()}x"
    try:
        run("ip", "netns", "add", name)
        run("ip", "link", "add", f"{name}0", "type", "veth", "peer", "name", f"{name}1")
        run("ip", "link", "del", f"{name}0")
        run("ip", "netns", "del", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces: {getattr(error, 'stderr', '') or error}"
    return ""


class Nodes:
    """The head is ``a``, 10.231.7.1; ``add`` starts others. Everything ends with ``close``."""

    head = "10.231.7.1"
    address = f"{head}:{PORT}"

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vdi"))
        self.token = self._secret("token", b"t" * 64)
        self.secret = self._secret("secret", b"s" * 32)
        self.started: dict[str, subprocess.Popen[str]] = {}
        (self.folder / "ray").mkdir()
        run("ip", "netns", "add", self.name("a"))
        self.ip("a", "link", "set", "lo", "up")

    def _secret(self, name: str, text: bytes) -> Path:
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
            "VDI_NODES": f"vdi{os.getpid()}",
        }

    def popen(self, node: str, command: Sequence[str], **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name(node), *command],
            cwd=ROOT,
            text=True,
            **({"env": self.environment} | more),
        )

    def start_head(self, **more: Any) -> None:
        options = ["--head", f"--port={PORT}", "--include-dashboard=false", "--num-cpus=1"]
        options += [f"--temp-dir={self.folder}/ray"]
        # its first peer's link is there before: without one the address is on no interface
        self.link("b", 2)
        self._ray("a", self.head, options, **more)

    def link(self, node: str, number: int) -> None:
        run("ip", "netns", "add", self.name(node))
        self.ip(node, "link", "set", "lo", "up")
        ours, theirs = f"vdi-{node}", "eth0"
        pair = ["link", "add", ours, "type", "veth", "peer", "name", theirs]
        self.ip("a", *pair, "netns", self.name(node))
        address = f"10.231.7.{number}"
        self.ip("a", "addr", "add", self.head, "peer", address, "dev", ours)
        self.ip(node, "addr", "add", address, "peer", self.head, "dev", theirs)
        self.ip("a", "link", "set", ours, "up")
        self.ip(node, "link", "set", theirs, "up")

    def add(
        self,
        node: str,
        number: int,
        *options: str,
        python_path: Path | None = None,
        secret: bytes | None = None,
    ) -> None:
        """``python_path``: before all packages of this one; ``secret``: at the secret's path."""
        if number != 2:
            self.link(node, number)
        own = self.folder / node
        own.mkdir()
        mounts = [f"mount --bind {own} {self.folder}/ray"]
        if secret is not None:
            mounts.append(f"mount --bind {self._secret(f'secret-{node}', secret)} {self.secret}")
        environment = self.environment
        if python_path is not None:
            environment["PYTHONPATH"] = str(python_path)
        self._ray(
            node,
            f"10.231.7.{number}",
            [f"--address={self.address}", *options],
            before=" && ".join(mounts) + " && ",
            env=environment,
        )

    def _ray(
        self, node: str, address: str, options: list[str], before: str = "", **more: Any
    ) -> None:
        store = f"--object-store-memory={STORE_BYTES}"
        command = [*RAY, store, f"--node-ip-address={address}", *options]
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
        """Run jobs of ``tests/ray/ask.py`` one after the other on a node; what came of each."""
        command = [sys.executable, "-m", "tests.ray.ask", json.dumps(jobs)]
        process = self.popen(node, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
        found = [json.loads(x[len("OUT ") :]) for x in out.splitlines() if x.startswith("OUT ")]
        assert len(found) == len(jobs), out[-3000:] + errors[-5000:]
        return found

    def pids(self, node: str) -> list[int]:
        done = subprocess.run(
            ["ip", "netns", "pids", self.name(node)], capture_output=True, text=True
        )
        return [int(line) for line in done.stdout.split()]

    def stop(self, node: str) -> None:
        """End all processes of a node, and its namespace."""
        for pid in self.pids(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if (process := self.started.pop(node, None)) is not None:
            process.wait(30)
        subprocess.run(["ip", "netns", "del", self.name(node)], capture_output=True)

    def close(self) -> None:
        for node in [*list(self.started)[::-1], "b", "a"]:
            self.stop(node)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        nodes.start_head()
        nodes.add("b", 2, "--num-cpus=1")
        yield nodes
    finally:
        nodes.close()
