"""Several engines behind one client: which of them gets a request, and what is told of each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from tests.server.fakes import client_of, make_server
from tests.server.replica_fakes import asked, begun, replicated, tokens

from vllm_di.components.interfaces import ReplicaLoad, Router
from vllm_di.components.messages import EngineRequest, EngineStats
from vllm_di.components.router.least_loaded import LeastLoadedRouter
from vllm_di.errors import PortError, RequestError


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
