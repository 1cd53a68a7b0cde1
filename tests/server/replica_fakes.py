"""Engines that count, behind the client of several."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from tests.server.fakes import REPORT

from vllm_di import SamplingParams
from vllm_di.components.interfaces import Router
from vllm_di.components.messages import EngineRequest, TokenOutput
from vllm_di.components.router.round_robin import RoundRobinRouter
from vllm_di.errors import EngineDeadError
from vllm_di.server.engine_client import ProcessEngineClient
from vllm_di.server.replicas import ReplicatedEngineClient


def asked(name: str, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 4) -> EngineRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_token_ids=list(prompt), params=params)


class FakeLine(ProcessEngineClient):
    """An engine that counts on from the tokens that it is given, one for each ``go`` or at once."""

    def __init__(self, name: str, last_words: str) -> None:
        super().__init__(name, last_words=last_words)
        self.seen: list[EngineRequest] = []
        self.held: asyncio.Event | None = None
        """Where set, each token but the first waits for it."""
        self.ends: list[asyncio.Event] = []

    async def start(self, assembly: bytes, command: Sequence[str] = ()) -> None:
        self.state, self.stage, self.report = "ready", "ready", REPORT
        self._settled.set()
        self._changed()

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        if self.state != "ready":
            raise EngineDeadError("not ready")
        self.seen.append(request)
        died = asyncio.Event()
        self.ends.append(died)
        known = len(request.prompt_token_ids) + len(request.generated_token_ids)
        end = len(request.prompt_token_ids) + (request.params.max_tokens or 0)
        for i in range(known, end):
            if i > known and self.held is not None:
                waits = [asyncio.ensure_future(e.wait()) for e in (self.held, died)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
            await asyncio.sleep(0)
            if died.is_set():
                raise EngineDeadError("it died")
            yield TokenOutput(
                request_id=request.request_id,
                token_ids=[i],
                finish_reason="length" if i == end - 1 else None,
                queue_time=0.5,
                num_cached_tokens=7,
            )

    def die(self, why: str = "it died", *, restarts: bool = False) -> None:
        self.state, self.failure = ("starting" if restarts else "dead"), why
        if self.on_death is not None:
            self.on_death()
        for end in self.ends:
            end.set()
        self._changed()

    def come_back(self) -> None:
        self.state, self.failure = "ready", None
        self._changed()

    async def replace(self) -> None:
        self.die(restarts=True)
        await asyncio.sleep(0)
        self.come_back()

    async def close(self) -> None:
        """Nothing was opened."""


def fakes(client: ReplicatedEngineClient) -> list[FakeLine]:
    found = [line.client for line in client._lines]
    assert all(isinstance(line, FakeLine) for line in found)
    return found  # type: ignore[return-value]


@asynccontextmanager
async def replicated(
    count: int = 2, router: Router | None = None
) -> AsyncIterator[tuple[ReplicatedEngineClient, list[FakeLine]]]:
    client = ReplicatedEngineClient(count, FakeLine)
    client.router = router or RoundRobinRouter()
    await client.start([b""] * count)
    await client.wait_ready()
    yield client, fakes(client)
    assert not any(replica.load.num_requests for replica in client.replicas())
    assert not any(replica.load.num_tokens for replica in client.replicas())
    await client.close()


async def tokens(client: ReplicatedEngineClient, request: EngineRequest) -> list[int]:
    found: list[int] = []
    async for output in client.generate(request):
        found += output.token_ids
    return found


async def begun(stream: AsyncIterator[TokenOutput]) -> TokenOutput:
    return await asyncio.wait_for(anext(stream), 60)


async def held(
    client: ReplicatedEngineClient, line: FakeLine, name: str = "r", max_tokens: int = 3
) -> asyncio.Task[list[int]]:
    """A request that a line has begun, and goes on with once ``line.held`` is set."""
    line.held = asyncio.Event()
    num_before = len(line.ends)
    running = asyncio.create_task(tokens(client, asked(name, max_tokens=max_tokens)))
    while len(line.ends) == num_before:
        await asyncio.sleep(0)
    return running
