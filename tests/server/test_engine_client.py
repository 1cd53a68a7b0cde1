"""The API process's line to a real engine process: answers, refusals, aborts, death."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from vllm_di.components.messages import EngineRequest, EngineStats, SamplingParams
from vllm_di.containers.assembly import assemble
from vllm_di.errors import ConfigError, EngineDeadError
from vllm_di.server import wire
from vllm_di.server.engine_client import ProcessEngineClient
from vllm_di.server.engine_watch import EngineProcess

TINY = ["platform=cpu", "model=tiny", "ops=torch", "model.dtype=float32"]


@asynccontextmanager
async def started(*overrides: str) -> AsyncIterator[ProcessEngineClient]:
    client = ProcessEngineClient()
    await client.start(assemble([*TINY, *overrides]).encode())
    try:
        yield client
    finally:
        await client.close()


def request(name: str, prompt: list[int], max_tokens: int = 4) -> EngineRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=params)


async def tokens(client: ProcessEngineClient, asked: EngineRequest) -> list[int]:
    found: list[int] = []
    async for output in client.generate(asked):
        found += output.token_ids
    return found


def test_requests_share_the_line_and_a_bad_one_harms_nobody() -> None:
    async def play() -> None:
        async with started() as client:
            with pytest.raises(EngineDeadError, match="not ready"):
                await tokens(client, request("early", [1]))
            await client.wait_ready()
            assert client.report is not None
            assert client.report.vocab_size == 320
            asked = [request(str(i), [i, i + 1]) for i in range(6)]
            answers = await asyncio.gather(*(tokens(client, a) for a in asked))
            assert [len(a) for a in answers] == [4] * 6
            outputs = [o async for o in client.generate(request("bad", [999]))]
            assert outputs[-1].finish_reason == "error"
            assert outputs[-1].error_status == 400
            assert "999" in (outputs[-1].error or "")
            assert await tokens(client, asked[0]) == answers[0]
            params = SamplingParams(temperature=0, max_tokens=4, allowed_token_ids=[5, 6])
            long = list(range(256, 320)) * 5
            same = [
                EngineRequest(request_id=f"s{i}", prompt_token_ids=long, params=params)
                for i in range(3)
            ]
            answers = await asyncio.gather(*(tokens(client, a) for a in same))
            assert answers[0] == answers[1] == answers[2]
            assert set(answers[0]) <= {5, 6}

    asyncio.run(play())


SLOW_START = """
from vllm_di.containers import engine_process
from vllm_di.progress import tell
opened = engine_process.open_engine
def slowly(assembly):
    tell("compiling kernels (once for this machine): 1 of 2 units")
    return opened(assembly)
engine_process.open_engine = slowly
engine_process.main()
"""


class Listening(ProcessEngineClient):
    """Keeps every stage that it was in."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def _take(self, message: wire.ToClient, engine: EngineProcess) -> None:
        super()._take(message, engine)
        self.stages.append(self.stage)


def test_what_a_start_is_at_is_the_stage() -> None:
    async def play() -> None:
        client = Listening()
        await client.start(assemble(TINY).encode(), (sys.executable, "-c", SLOW_START))
        try:
            await client.wait_ready()
            told = "compiling kernels (once for this machine): 1 of 2 units"
            assert client.stages == ["load", told, "ready"]
        finally:
            await client.close()

    asyncio.run(play())


def test_an_early_close_frees_the_blocks() -> None:
    async def play() -> None:
        seen: list[EngineStats] = []
        async with started() as client:
            client.on_stats = seen.append
            await client.wait_ready()
            stream = client.generate(request("long", [1, 2, 3], 1500))
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            await tokens(client, request("next", [4]))
            assert seen[-1].num_running == 0
            assert seen[-1].kv_cache_usage == 0

    asyncio.run(play())


def test_death_reaches_every_open_request() -> None:
    async def play() -> None:
        async with started() as client:
            await client.wait_ready()
            pid = client.pid
            running = asyncio.Event()
            client.on_stats = lambda stats: running.set() if stats.num_running == 3 else None
            open_requests = [
                asyncio.create_task(tokens(client, request(str(i), [1], 1900))) for i in range(3)
            ]
            await running.wait()
            os.kill(pid, signal.SIGKILL)
            answers = await asyncio.gather(*open_requests, return_exceptions=True)
            assert all(isinstance(a, EngineDeadError) for a in answers)
            assert "killed by signal 9" in str(answers[0])
            assert client.state == "dead"
            with pytest.raises(EngineDeadError):
                await tokens(client, request("late", [1]))

    asyncio.run(play())


def test_a_start_that_fails_says_why_in_its_own_words() -> None:
    async def play() -> None:
        async with started("worker.num_blocks=1") as client:
            with pytest.raises(ConfigError, match="room for 1 block "):
                await client.wait_ready()
            assert client.state == "dead"

    asyncio.run(play())


def test_a_process_that_never_speaks() -> None:
    async def play() -> None:
        client = ProcessEngineClient()
        await client.start(b"", ["/bin/false"])
        with pytest.raises(EngineDeadError, match="exit status 1 at its start"):
            await client.wait_ready()
        await client.close()

    asyncio.run(play())
