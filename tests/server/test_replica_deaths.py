"""Several engines behind one client: one dies, or is drained, and its requests go on elsewhere."""

from __future__ import annotations

import asyncio

import pytest
from tests.server.replica_fakes import asked, begun, held, replicated, tokens

from vllm_di.components.messages import EngineStats
from vllm_di.errors import EngineDeadError
from vllm_di.server.replicas import MOST_DEATHS


@pytest.mark.parametrize("num_before", [0, 1])
def test_a_death_loses_no_token_and_sends_none_twice(num_before: int) -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            running = await held(client, lines[0], max_tokens=5)
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
            running = await held(client, lines[0])
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
            for number, line in enumerate(reversed(lines)):
                line.die(f"death {number}")
            assert client.state == "dead"
            assert [stats.replica for stats in seen] == [1, 0]
            with pytest.raises(EngineDeadError, match=r"no replica is left.* so: death 1"):
                await asyncio.wait_for(client.wait_dead(), 60)
            with pytest.raises(EngineDeadError):
                await tokens(client, asked("r"))

    asyncio.run(play())


def test_a_drain_ends_nothing_and_takes_nothing() -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            old = await held(client, lines[0], "old")
            replacing = asyncio.create_task(client.replace(0, 60))
            await asyncio.sleep(0)
            assert [r.state for r in client.replicas()] == ["draining", "ready"]
            for i in range(3):
                assert await tokens(client, asked(f"new {i}", max_tokens=1)) == [3]
            assert len(lines[0].seen) == 1
            assert not replacing.done()
            assert lines[0].held is not None
            lines[0].held.set()
            assert await old == [3, 4, 5]
            await replacing
            assert [r.state for r in client.replicas()] == ["ready", "ready"]

    asyncio.run(play())


def test_what_a_drain_does_not_wait_for_goes_on_elsewhere() -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            old = await held(client, lines[0], "old")
            await client.replace_all(0.01)
            assert await old == [3, 4, 5]

    asyncio.run(play())


def test_the_last_replica_is_not_drained() -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            lines[1].die()
            async with asyncio.timeout(5):
                with pytest.raises(EngineDeadError, match=r"replica 0 .* no other is left"):
                    await client.replace(0, 60)
                assert await tokens(client, asked("r", max_tokens=1)) == [3]

    asyncio.run(play())


def test_a_replica_takes_requests_until_another_does() -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            lines[1].die(restarts=True)
            replacing = asyncio.create_task(client.replace(0, 60))
            await asyncio.sleep(0)
            async with asyncio.timeout(5):
                assert await tokens(client, asked("r", max_tokens=1)) == [3]
                assert not replacing.done()
                lines[1].come_back()
                await replacing
            assert [r.state for r in client.replicas()] == ["ready", "ready"]

    asyncio.run(play())


def test_a_replica_whose_only_peer_ends_meanwhile_stays() -> None:
    async def play() -> None:
        async with replicated() as (client, lines):
            lines[1].die(restarts=True)
            replacing = asyncio.create_task(client.replace(0, 60))
            await asyncio.sleep(0)
            lines[1].die()
            async with asyncio.timeout(5):
                with pytest.raises(EngineDeadError, match="no other is left"):
                    await replacing
                assert await tokens(client, asked("r", max_tokens=1)) == [3]

    asyncio.run(play())
