"""Replicas whose workers Ray places: what becomes of them, and of their requests, when a node is
lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.ray.nodes import TINY, Nodes
from tests.ray.test_ray import on

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
WAIT_SECONDS = 150
BODIES = [
    {"model": "tiny", "prompt": f"{word} " * 9, "max_tokens": 150, "temperature": 0}
    | {"ignore_eos": True}
    for word in ("one", "two", "three", "four", "five", "six")
]


class Served:
    """A server with two replicas, on the head."""

    def __init__(self, process: Any, client: httpx.Client, unix: Path, log: Path) -> None:
        self.process, self.client, self.unix, self.log = process, client, unix, log

    def states(self) -> list[str]:
        return [one["status"] for one in self.client.get("/health").json()["replicas"]]

    def stage(self, replica: int) -> str:
        return str(self.client.get("/health").json()["replicas"][replica])

    def answer(self, body: dict[str, Any]) -> str:
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def answers(self) -> list[str]:
        with ThreadPoolExecutor(len(BODIES)) as pool:
            return list(pool.map(self.answer, BODIES))

    def taken_by(self, replica: int) -> float:
        """Requests that a replica has finished."""
        lines = self.client.get("/metrics").text.splitlines()
        mark = f'engine="{replica}"'
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith("vllm:request_success_total") and mark in line
        )

    def wait(self, is_so: Callable[[], bool]) -> float:
        """Seconds until it is so."""
        begin = time.monotonic()
        while True:
            text = self.log.read_text()[-4000:]
            assert self.process.poll() is None, text
            assert time.monotonic() - begin < WAIT_SECONDS, text
            with suppress(httpx.TransportError, KeyError, ValueError):
                if self.unix.exists() and is_so():
                    return time.monotonic() - begin
            time.sleep(0.05)


@contextmanager
def served(nodes: Nodes, *more: str) -> Iterator[Served]:
    unix, log = nodes.folder / "api", nodes.folder / "serve.log"
    command = [str(Path(sys.executable).parent / "vllm-di"), "serve", "model=tiny", *TINY]
    command += [*on(nodes), "executor.data_parallel_size=2", "router=round_robin"]
    command += [f"server.unix_socket={unix}", *more]
    with log.open("w") as out:
        process = nodes.popen("a", command, stdout=out, stderr=out)
    transport = httpx.HTTPTransport(uds=str(unix))
    with httpx.Client(transport=transport, base_url="http://localhost", timeout=100) as client:
        try:
            found = Served(process, client, unix, log)
            found.wait(lambda: found.states() == ["ready", "ready"])
            yield found
        finally:
            process.terminate()
            process.wait(60)


def test_a_replica_is_placed_anew_when_its_node_is_lost(nodes: Nodes) -> None:
    """Two replicas on two nodes, of which one loses its power while both answer: no answer is
    another one, the other replica goes on, and a third node, which has room, gets the worker. When
    that is lost too there is no room, until a fourth comes."""
    resource = ("--num-cpus=0", '--resources={"replica": 1}')
    nodes.add("r", 10, *resource)
    nodes.add("s", 11, *resource)
    try:
        with served(nodes, "executor.resource=replica", "server.engine_restarts=9") as server:
            want = server.answers()
            assert len({*want}) == len(BODIES)
            nodes.add("t", 12, *resource)
            with ThreadPoolExecutor(2) as pool:
                rounds = [pool.submit(server.answers) for _ in range(6)]
                server.wait(lambda: rounds[0].done())
                nodes.kill("s")
                noticed = server.wait(lambda: server.states().count("ready") == 1)
                assert [one.result() for one in rounds] == [want] * 6
            [number] = [i for i, state in enumerate(server.states()) if state != "ready"]
            took = server.wait(lambda: server.states() == ["ready", "ready"])
            sys.stdout.write(f"noticed after {noticed:.1f} s, on another node {took:.1f} s later\n")
            before = server.taken_by(number)
            assert server.answers() == want
            assert server.taken_by(number) > before
            nodes.kill("t")
            server.wait(lambda: server.states()[number] == "starting")
            assert server.answers() == want
            server.wait(lambda: "has no room" in server.stage(number))
            nodes.add("u", 13, *resource)
            took = server.wait(lambda: server.states() == ["ready", "ready"])
            before = server.taken_by(number)
            assert server.answers() == want
            assert server.taken_by(number) > before
            sys.stdout.write(f"back {took:.1f} s after a node came\n")
        text = server.log.read_text()
        for lost in (11, 12):
            assert f"(node {nodes.address_of(lost)})" in text, text[-4000:]
    finally:
        for node in ("r", "s", "t", "u"):
            nodes.stop(node)


def test_a_replica_is_placed_anew_where_its_worker_was(nodes: Nodes) -> None:
    """Of two replicas on the two first nodes one worker is killed."""
    with served(nodes) as server:
        want = server.answers()
        [worker] = [
            process
            for process in psutil.Process(nodes.started["b"].pid).children(recursive=True)
            if "ray::NodeWorker" in " ".join(process.cmdline())
        ]
        os.kill(worker.pid, signal.SIGKILL)
        server.wait(lambda: server.states().count("ready") == 1)
        assert server.answers() == want
        back = server.wait(lambda: server.states() == ["ready", "ready"])
        assert server.answers() == want
        sys.stdout.write(f"back after {back:.1f} s\n")
