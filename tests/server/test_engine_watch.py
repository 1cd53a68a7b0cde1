"""Engine processes that are stopped, hang and die: real processes round a fake engine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.fakes import REPORT, client_of, completion, make_server

from vllm_di.components import heartbeat
from vllm_di.components.interfaces import Engine
from vllm_di.components.messages import EngineOutputs, EngineRequest, EngineStats, Peer, TokenOutput
from vllm_di.components.transport import Codec, Connection, connect
from vllm_di.containers import engine_process
from vllm_di.errors import EngineDeadError
from vllm_di.server import wire
from vllm_di.server.app import OpenAiServer
from vllm_di.server.engine_client import ProcessEngineClient
from vllm_di.server.engine_watch import EngineProcess

ROOT = str(Path(__file__).parents[2])
SCRIPT = (
    f"import sys; sys.path.insert(0, {ROOT!r}); "
    "from tests.server.test_engine_watch import main; main(sys.argv[1], sys.argv[-1])"
)
LONG, HANG, DIE, LEAVE = 100, 101, 102, 103
"""Prompt tokens that the fake engine obeys: a step of some seconds, one without end, and so on."""


def _output(request: EngineRequest, token: int) -> TokenOutput:
    return TokenOutput(request_id=request.request_id, token_ids=[token], finish_reason="length")


class Obedient(Engine):
    """Answers each request with its first token."""

    report = REPORT
    patience = 3.0

    def __init__(self) -> None:
        self._requests: list[EngineRequest] = []
        self.peers: list[Peer] = []

    def add(self, request: EngineRequest) -> None:
        self._requests.append(request)

    def abort(self, request_id: str) -> None:
        self._requests = [r for r in self._requests if r.request_id != request_id]

    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self) -> EngineOutputs:
        outputs = []
        for request in self._requests:
            token = request.prompt_token_ids[0]
            if token in (LONG, HANG):
                time.sleep(4 if token == LONG else 600)
            if token == DIE:
                os.kill(os.getpid(), signal.SIGKILL)
            if token == LEAVE:
                raise ZeroDivisionError("as it happens")
            outputs.append(_output(request, token))
        self._requests = []
        return EngineOutputs(outputs=outputs, stats=EngineStats())

    def reset_prefix_cache(self) -> None:
        """Nothing is cached."""

    def processes(self) -> list[Peer]:
        return self.peers


def main(patience: str, address: str) -> None:
    """The engine process, as engine_process.main has it, without a container."""
    heart = heartbeat.Heart(address)
    connection: Connection[wire.ToEngine] = Connection(connect(address), Codec(wire.ToEngine))
    told = sys.stdin.read()
    engine = Obedient()
    engine.patience = float(patience)
    engine.peers = [Peer(name, os.getpid(), silent=True) for name in told.split()]
    pulse = engine_process.Pulse(engine)
    heart.state = pulse.beat
    connection.send(wire.Ready(engine.report, engine.patience))
    engine_process.serve(engine, connection, pulse)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "SILENCE", 1.2)
    monkeypatch.setattr(heartbeat, "STACK_SECONDS", 0.5)


@asynccontextmanager
async def started(
    told: str = "", patience: float = 3.0, **settings: Any
) -> AsyncIterator[tuple[ProcessEngineClient, OpenAiServer, httpx.AsyncClient]]:
    client = ProcessEngineClient()
    server = make_server(client, **settings)
    await client.start(told.encode(), [sys.executable, "-c", SCRIPT, str(patience)])
    try:
        await client.wait_ready()
        async with client_of(server) as web:
            yield client, server, web
    finally:
        await client.close()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """The test run's own time limit ends a wait that never comes true."""
    while not await condition():
        await asyncio.sleep(0.01)


def ready_is(web: httpx.AsyncClient, status: int) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return (await web.get("/readyz")).status_code == status

    return check


def ask(web: httpx.AsyncClient, token: int) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(
        web.post("/v1/completions", json=completion([token], max_tokens=1), timeout=60)
    )


def test_a_stopped_engine_is_not_ready_until_it_answers_again() -> None:
    async def play() -> None:
        async with started() as (client, _, web):
            await until(ready_is(web, 200))
            os.kill(client.pid, signal.SIGSTOP)
            await until(ready_is(web, 503))
            told = (await web.get("/readyz")).json()
            assert told == {"status": "unresponsive", "processes": ["engine"]}
            assert (await web.get("/livez")).status_code == 200
            os.kill(client.pid, signal.SIGCONT)
            await until(ready_is(web, 200))
            assert (await ask(web, 65)).status_code == 200

    asyncio.run(play())


def test_a_silent_worker_is_named() -> None:
    async def play() -> None:
        async with started("worker_1") as (_, _, web):
            await until(ready_is(web, 503))
            told = (await web.get("/readyz")).json()
            assert told == {"status": "unresponsive", "processes": ["worker_1"]}

    asyncio.run(play())


def test_a_long_step_beats_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than a silence may last, which a busy machine must not make of half a second."""
    monkeypatch.setattr(heartbeat, "SILENCE", 2.5)

    async def play() -> None:
        async with started(patience=60) as (client, _, web):
            heard: list[object] = []
            client._on_silence = heard.append  # type: ignore[assignment,method-assign]
            assert (await ask(web, LONG)).status_code == 200
            assert heard == []

    asyncio.run(play())


@pytest.mark.parametrize(
    ("token", "stop", "why"),
    [
        (HANG, False, "the engine process took more than 3 s for a step and was killed"),
        (HANG, True, "the engine process gave no sign of life for 3 s and was killed"),
        (DIE, False, "the engine process was killed by signal 9"),
        (LEAVE, False, "the engine process ended with exit status 1"),
    ],
)
def test_an_engine_that_ends_is_replaced_once(
    token: int,
    stop: bool,
    why: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spawn = EngineProcess.spawn

    async def play() -> None:
        async with started(engine_restarts=1) as (client, server, web):
            may_start = asyncio.Event()

            async def later(
                command: Sequence[str], assembly: bytes, *arguments: str
            ) -> EngineProcess:
                await may_start.wait()
                return await spawn(command, assembly, *arguments)

            monkeypatch.setattr(EngineProcess, "spawn", later)
            first = client.pid
            lost = ask(web, token)
            if stop:
                while server._service.admission.in_flight == 0:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0)
                os.kill(first, signal.SIGSTOP)
            answer = await lost
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_dead"
            assert why in answer.json()["error"]["message"]
            told = (await web.get("/readyz")).json()
            assert (told["status"], told["stage"]) == ("starting", "restart")
            assert why in told["reason"]
            refused = await ask(web, 65)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "starting"
            assert "retry-after" in refused.headers
            may_start.set()
            await until(ready_is(web, 200))
            assert client.pid != first
            assert (await ask(web, 65)).json()["choices"][0]["text"] == "A"
            os.kill(client.pid, signal.SIGKILL)
            with pytest.raises(
                EngineDeadError,
                match=r"signal 9; no restart is left \(server.engine_restarts=1 in 10 minutes\)",
            ):
                await client.wait_dead()
            assert (await web.get("/livez")).status_code == 503

    asyncio.run(play())
    if token == HANG and not stop:
        assert "in step" in capfd.readouterr().err  # where it hung


def test_a_server_whose_engine_is_dead_for_good_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        async with started(engine_restarts=0, port=0) as (client, server, _):
            running = asyncio.create_task(server.run())
            while server.address is None:
                await asyncio.sleep(0.001)
            os.kill(client.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="no restart is left"):
                await running

    asyncio.run(play())
    assert "the engine died: the engine process was killed by signal 9" in caplog.text


def test_a_process_that_cannot_be_started_again_is_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_spawn(*_: object) -> EngineProcess:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    async def play() -> None:
        async with started(engine_restarts=2) as (client, _, web):
            monkeypatch.setattr(EngineProcess, "spawn", no_spawn)
            os.kill(client.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="no new engine process can be started"):
                await client.wait_dead()
            assert (await web.get("/livez")).status_code == 503

    asyncio.run(play())


def test_a_draining_server_replaces_no_engine() -> None:
    async def play() -> None:
        async with started(engine_restarts=9, port=0, drain_seconds=60) as (client, server, web):
            running = asyncio.create_task(server.run())
            while server.address is None:
                await asyncio.sleep(0.001)
            answer = ask(web, LONG)
            while server._service.admission.in_flight == 0:
                await asyncio.sleep(0.001)
            server.stop()
            while not server._service.admission.draining:
                await asyncio.sleep(0.001)
            os.kill(client.pid, signal.SIGKILL)
            assert (await answer).status_code == 503
            await running
            assert client.state == "dead"

    asyncio.run(play())
