"""Several engines behind one API process: routing, death, drain."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest
from tests.server.fakes import REPORT, client_of, make_server

from vllm_di import SamplingParams
from vllm_di.components.interfaces import ReplicaLoad, Router
from vllm_di.components.messages import EngineRequest, EngineStats, TokenOutput
from vllm_di.components.router.least_loaded import LeastLoadedRouter
from vllm_di.components.router.round_robin import RoundRobinRouter
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import open_engine, opened
from vllm_di.containers.slots import ServerContainer
from vllm_di.errors import ConfigError, EngineDeadError, PortError, RequestError
from vllm_di.server.engine_client import ProcessEngineClient
from vllm_di.server.replicas import MOST_DEATHS, ReplicatedEngineClient

TINY = ["platform=cpu", "model=tiny", "ops=torch", "model.dtype=float32", "device.threads=1"]
TWO = [*TINY, "executor.data_parallel_size=2"]


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

    def die(self, *, restarts: bool = False) -> None:
        self.state, self.failure = ("starting" if restarts else "dead"), "it died"
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
    return await asyncio.wait_for(anext(stream), 5)


def test_requests_are_shared_out_and_loads_are_told() -> None:
    async def play() -> None:
        async with replicated(router=LeastLoadedRouter()) as (client, lines):
            for line in lines:
                line.held = asyncio.Event()
            streams = [client.generate(asked(str(i), max_tokens=3)) for i in range(4)]
            outputs = [await begun(stream) for stream in streams]
            assert [output.replica for output in outputs] == [0, 1, 0, 1]
            assert [r.load.num_requests for r in client.replicas()] == [2, 2]
            assert [r.load.num_tokens for r in client.replicas()] == [8, 8]
            with pytest.raises(RequestError, match="in use"):
                await tokens(client, asked("0"))
            for stream in streams:
                await stream.aclose()  # type: ignore[attr-defined]
            assert [r.load.num_requests for r in client.replicas()] == [0, 0]

    asyncio.run(play())


@pytest.mark.parametrize("num_before", [0, 1])
def test_a_death_loses_no_token_and_sends_none_twice(num_before: int) -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            lines[0].held = asyncio.Event()
            running = asyncio.create_task(tokens(client, asked("r", max_tokens=5)))
            while not lines[0].ends:
                await asyncio.sleep(0)
            for _ in range(10 * num_before):
                await asyncio.sleep(0)
            lines[0].die()
            assert await running == [3, 4, 5, 6, 7]
            assert lines[1].seen[0].generated_token_ids == [3][:num_before]
            assert client.state == "ready"
            assert [r.state for r in client.replicas()] == ["dead", "ready"]

    asyncio.run(play())


def test_a_continued_answer_tells_cache_and_queue_once() -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            lines[0].held = asyncio.Event()
            stream = client.generate(asked("r", max_tokens=3))
            first = await begun(stream)
            lines[0].die()
            rest = [output async for output in stream]
            assert (first.replica, first.queue_time, first.num_cached_tokens) == (0, 0.5, 7)
            assert {(o.replica, o.queue_time, o.num_cached_tokens) for o in rest} == {(1, 0.0, 0)}

    asyncio.run(play())


def test_a_request_that_saw_too_many_deaths_ends() -> None:
    async def play() -> None:
        async with replicated(3) as (client, lines):
            for line in lines:
                line.held = asyncio.Event()
            running = asyncio.create_task(tokens(client, asked("r", max_tokens=9)))
            for number in range(MOST_DEATHS):
                while not lines[number].ends:
                    await asyncio.sleep(0)
                lines[number].die()
            with pytest.raises(EngineDeadError, match="it died"):
                await running
            assert not lines[2].seen

    asyncio.run(play())


def test_a_request_waits_for_a_replica_that_comes_back() -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            lines[1].die(restarts=True)
            lines[0].held = asyncio.Event()
            running = asyncio.create_task(tokens(client, asked("r", max_tokens=3)))
            while not lines[0].ends:
                await asyncio.sleep(0)
            lines[0].die()
            assert client.state == "starting"
            await asyncio.sleep(0.01)
            assert not running.done()
            lines[1].come_back()
            assert await running == [3, 4, 5]

    asyncio.run(play())


def test_the_last_death_is_that_of_all() -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            seen: list[EngineStats] = []
            client.on_stats = seen.append
            for line in lines:
                line.die()
            assert client.state == "dead"
            assert [stats.replica for stats in seen] == [0, 1]
            with pytest.raises(EngineDeadError, match="no replica is left"):
                await asyncio.wait_for(client.wait_dead(), 5)
            with pytest.raises(EngineDeadError):
                await tokens(client, asked("r"))

    asyncio.run(play())


def test_a_drain_ends_nothing_and_takes_nothing() -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            lines[0].held = asyncio.Event()
            old = asyncio.create_task(tokens(client, asked("old", max_tokens=3)))
            while not lines[0].ends:
                await asyncio.sleep(0)
            replacing = asyncio.create_task(client.replace(0, 60))
            await asyncio.sleep(0)
            assert [r.state for r in client.replicas()] == ["draining", "ready"]
            for i in range(3):
                assert await tokens(client, asked(f"new {i}", max_tokens=1)) == [3]
            assert len(lines[0].seen) == 1
            assert not replacing.done()
            lines[0].held.set()
            assert await old == [3, 4, 5]
            await replacing
            assert [r.state for r in client.replicas()] == ["ready", "ready"]

    asyncio.run(play())


def test_what_a_drain_does_not_wait_for_goes_on_elsewhere() -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            lines[0].held = asyncio.Event()
            old = asyncio.create_task(tokens(client, asked("old", max_tokens=3)))
            while not lines[0].ends:
                await asyncio.sleep(0)
            await client.replace_all(0.01)
            assert await old == [3, 4, 5]

    asyncio.run(play())


def test_a_silent_replica_gets_no_request() -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            lines[0]._on_silence(("engine",))
            for i in range(3):
                await tokens(client, asked(str(i)))
            assert not lines[0].seen
            assert not client.silent
            assert [r.state for r in client.replicas()] == ["unresponsive", "ready"]
            lines[1]._on_silence(("engine",))
            assert list(client.silent) == ["engine", "engine"]

    asyncio.run(play())


def test_totals_of_replicas_are_counted_apart() -> None:
    """The totals of two engines that tell theirs in turns: neither counts what the other has."""

    async def play() -> None:
        async with replicated() as (client, lines):
            server = make_server(client)
            for step in range(1, 6):
                for line, hits in zip(lines, (10, 300), strict=True):
                    assert line.on_stats is not None
                    line.on_stats(EngineStats(num_running=step, prefix_cache_hits=hits * step))
            async with client_of(server) as http:
                found = (await http.get("/metrics")).text.splitlines()
            for engine, total in (("0", "50.0"), ("1", "1500.0")):
                labels = f'{{engine="{engine}",model_name="echo"}}'
                assert f"vllm:prefix_cache_hits_total{labels} {total}" in found
                assert f"vllm:num_requests_running{labels} 5.0" in found

    asyncio.run(play())


def test_a_router_that_chooses_none_of_those_offered_is_named() -> None:
    class Wrong(Router):
        def choose(self, request: EngineRequest, loads: Sequence[ReplicaLoad]) -> int:
            return 7

    async def play() -> None:
        async with replicated(router=Wrong()) as (client, _):
            with pytest.raises(PortError, match="Wrong chose replica 7, of 0, 1"):
                await tokens(client, asked("r"))

    asyncio.run(play())


# -- real engines ---------------------------------------------------------------------------------


PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=7, top_k=50, max_tokens=12, ignore_eos=True),
    SamplingParams(
        temperature=0, max_tokens=12, frequency_penalty=1.5, presence_penalty=0.5, ignore_eos=True
    ),
    SamplingParams(temperature=0.7, seed=3, max_tokens=12, min_tokens=8, logprobs=2),
    SamplingParams(temperature=0, max_tokens=12, structured_output={"guided_regex": "[ab]{20}"}),
    SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0, ignore_eos=True),
]


def test_an_engine_goes_on_behind_the_tokens_of_another() -> None:
    """Greedy or with a seed, penalties, a grammar: the same tokens, wherever the cut is."""
    with open_engine(assemble(TINY)) as engine:

        def run(request: EngineRequest) -> tuple[list[int], str | None]:
            engine.add(request)
            found: list[int] = []
            while True:
                for output in engine.step().outputs:
                    found += output.token_ids
                    assert output.error is None
                    if request.generated_token_ids:
                        assert output.prompt_logprobs is None
                    if output.finish_reason is not None:
                        return found, output.finish_reason

        prompt = list(range(1, 41))
        for params in PARAMS:
            whole = EngineRequest(request_id="w", prompt_token_ids=prompt, params=params)
            expected, reason = run(whole)
            for cut in (1, 5, len(expected) - 1):
                rest = msgspec.structs.replace(whole, generated_token_ids=expected[:cut])
                assert run(rest) == (expected[cut:], reason)
        with pytest.raises(RequestError, match="generated_token_ids: 12 tokens"):
            engine.add(msgspec.structs.replace(whole, generated_token_ids=[1] * 12))


def test_an_engine_whose_scheduler_cannot_go_on_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(assemble(TINY)) as engine:
        scheduler = engine._scheduler  # type: ignore[attr-defined]
        monkeypatch.setattr(type(scheduler), "continues", False)
        request = msgspec.structs.replace(asked("r"), generated_token_ids=[1])
        with pytest.raises(RequestError, match="ContinuousScheduler cannot go on"):
            engine.add(request)


@pytest.mark.parametrize("value", ["0", "-1", "65", "1.5", "many", "null"])
def test_a_bad_number_of_replicas_has_a_place(value: str) -> None:
    with pytest.raises(ConfigError, match=r"executor\.data_parallel_size=.*from 1 to 64"):
        assemble([*TINY, f"executor.data_parallel_size={value}"])


def test_replicas_need_the_server() -> None:
    assembly = assemble(TWO)
    with pytest.raises(ConfigError, match="data_parallel_size=2: replicas are engine processes"):
        open_engine(assembly).__enter__()
    with open_engine(assembly.of_replica(1)) as engine:
        assert engine.report.num_blocks > 0


def test_more_replicas_than_cores_is_an_error() -> None:
    many = [o for o in TINY if "threads" not in o]
    assembly = assemble([*many, "executor.data_parallel_size=64"])
    if (os.cpu_count() or 1) >= 64:
        pytest.skip("this machine has a core for each")
    with pytest.raises(ConfigError, match=r"executor\.data_parallel_size=64: 64 workers"):
        open_engine(assembly.of_replica(0)).__enter__()


def test_replicas_share_memory_and_cores() -> None:
    sizes = []
    for count in (1, 4):
        budget = ["device.memory_budget=64MiB", "worker.max_num_seqs=64"]
        assembly = assemble([*TINY, *budget, f"executor.data_parallel_size={count}"])
        with open_engine(assembly.of_replica(0)) as engine:
            sizes.append(engine.report.num_blocks)
    assert sizes[1] <= sizes[0] / 2


def test_two_replicas_over_http_with_a_kill() -> None:
    async def play() -> None:
        assembly = assemble([*TWO, "server.port=0", "router=round_robin"])
        client = ReplicatedEngineClient(2)
        await client.start([assembly.of_replica(i).encode() for i in range(2)])
        with opened(ServerContainer, assembly, engine_client=client) as container:
            client.router = container.router()
            server = container.server()
            running = asyncio.create_task(server.run())
            try:
                await asyncio.wait_for(client.wait_ready(), 120)
                while server.address is None:  # type: ignore[attr-defined]
                    await asyncio.sleep(0.01)
                base = server.address  # type: ignore[attr-defined]
                async with httpx.AsyncClient(base_url=base, timeout=60) as http:
                    await _kill_one(http, client)
            finally:
                server.stop()  # type: ignore[attr-defined]
                await running
                await client.close()

    asyncio.run(play())


async def _kill_one(http: httpx.AsyncClient, client: ReplicatedEngineClient) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 160, "temperature": 0, "ignore_eos": True}

    async def ask(i: int, **more: object) -> list[int]:
        asking = body | {"prompt": [5, 6, i], "return_token_ids": True} | more
        answer = await http.post("/v1/completions", json=asking)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert answer.json()["usage"]["completion_tokens"] == asking["max_tokens"]
        return [*choice["text"].encode()]

    expected = [await ask(i) for i in range(4)]
    metrics = (await http.get("/metrics")).text
    for name in ("vllm:num_requests_running", "vllm:generation_tokens_total"):
        for engine in "01":
            assert f'{name}{{engine="{engine}",' in metrics
    asking = [asyncio.create_task(ask(i)) for i in range(4)]
    while min(replica.load.num_tokens for replica in client.replicas()) < 40:
        assert not all(task.done() for task in asking)
        await asyncio.sleep(0.001)
    os.kill(client.pids[0], signal.SIGKILL)
    assert await asyncio.gather(*asking) == expected
    health = (await http.get("/health")).json()
    assert health["status"] == "ready"
    assert health["replicas"][1] == {"status": "ready"}
    while client.replicas()[0].state != "ready":
        await asyncio.sleep(0.02)
    assert (await http.get("/health")).json()["replicas"] == [{"status": "ready"}] * 2
    load = (await http.get("/load")).json()
    assert load == {
        "server_load": 0,
        "replicas": [{"running_or_waiting": 0, "tokens": 0}] * 2,
    }
    before = client.pids
    await client.replace(1, 5)
    after = client.pids
    assert (after[0], after[1] != before[1]) == (before[0], True)
    assert [await ask(i) for i in range(2)] == expected[:2]
