"""Several real engines: what they share, and how one goes on behind the tokens of another."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import msgspec
import pytest
from tests.server.replica_fakes import asked

from vllm_di import SamplingParams
from vllm_di.components.messages import EngineRequest
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import open_engine, opened
from vllm_di.containers.slots import ServerContainer
from vllm_di.errors import ConfigError, RequestError
from vllm_di.server.replicas import ReplicatedEngineClient

TINY = ["platform=cpu", "model=tiny", "ops=torch", "model.dtype=float32", "device.threads=1"]
TWO = [*TINY, "executor.data_parallel_size=2"]

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


@pytest.mark.parametrize("value", ["0", "-1", "1025", "1.5", "many", "null"])
def test_a_bad_number_of_replicas_has_a_place(value: str) -> None:
    with pytest.raises(ConfigError, match=r"executor\.data_parallel_size=.*from 1 to 1024"):
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


def pids(client: ReplicatedEngineClient) -> list[int]:
    return [line.client.pid for line in client._lines]


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
    both_are_busy = False
    while not both_are_busy:  # on a busy machine they may be done before it is seen
        asking = [asyncio.create_task(ask(i)) for i in range(4)]
        while not both_are_busy and not all(task.done() for task in asking):
            await asyncio.sleep(0.001)
            both_are_busy = min(replica.load.num_tokens for replica in client.replicas()) >= 40
    os.kill(pids(client)[0], signal.SIGKILL)
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
    before = pids(client)
    await client.replace(1, 5)
    after = pids(client)
    assert (after[0], after[1] != before[1]) == (before[0], True)
    assert [await ask(i) for i in range(2)] == expected[:2]
