"""Every slot of every container can be filled by another class, and that class is used."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from tests import probes
from tests.local_client import LocalEngineClient

from vllm_di import LLM, SamplingParams
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.containers.explain import explain
from vllm_di.containers.fill import open_engine, opened
from vllm_di.containers.slots import (
    EngineContainer,
    ServerContainer,
    WorkerContainer,
    slots,
)

TINY = ["platform=cpu", "model=tiny", "model.dtype=float32", "ops=torch", "trust=[tests]"]
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def probed(slot: str, *overrides: str) -> list[str]:
    """Overrides that put the probe of the default class into a slot."""
    plain = assemble([*TINY, *overrides])
    nodes = {**plain.server, **plain.engine, **plain.stages[0]}
    option = [f"{slot}={plain.choices[slot].option}"] if slot in plain.choices else []
    return [*TINY, *option, f"{slot}._target_={probes.name_of(nodes[slot]['_target_'])}"]


@pytest.fixture(scope="module")
def expected() -> list[int]:
    with LLM(overrides=TINY) as llm:
        return llm.generate("hello", GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize("slot", [*slots(EngineContainer), *slots(WorkerContainer)])
def test_engine_and_worker(slot: str, expected: list[int]) -> None:
    probes.CALLS.clear()
    # a worker of one role alone moves no cache
    split = ["platform=split_cpu_cpu"] if slot == "kv_transfer" else []
    with LLM(overrides=[*probed(slot, *split), *split]) as llm:
        assert llm.generate("hello", GREEDY)[0].outputs[0].token_ids == expected
    assert probes.CALLS[slot] > 0
    assert set(probes.CALLS) == {slot}


@pytest.mark.parametrize(
    "slot", [slot for slot in slots(ServerContainer) if slot not in ("router", "tracing")]
)  # these two are called where there are replicas, or something records
def test_server(slot: str) -> None:
    probes.CALLS.clear()
    port = _free_port()
    assembly = assemble([*probed(slot), f"server.port={port}"])
    with open_engine(assembly) as engine:
        status, body = asyncio.run(_ask(assembly, LocalEngineClient(engine), port))
    assert status == 200, body
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert probes.CALLS[slot] > 0


def test_explain_names_the_probe() -> None:
    rows = explain(assemble(probed("attention")), ops=False).rows
    row = next(r for r in rows if r.slot == "attention")
    assert (row.target, row.chosen_by) == ("tests.probes.PagedAttentionProbe", "command line")


def test_the_command_line_beats_the_platform(expected: list[int]) -> None:
    """`explain` says sdpa and command line, and a generation with it runs that class."""
    choice = assemble(["platform=cpu", "attention=sdpa"]).choices["attention"]
    assert (choice.option, choice.origin.chosen_by) == ("sdpa", "command line")
    target = probes.name_of("vllm_di.components.attention.sdpa.SdpaAttention")
    probes.CALLS.clear()
    with LLM(overrides=[*TINY, "attention=sdpa", f"attention._target_={target}"]) as llm:
        assert llm.generate("hello", GREEDY)[0].outputs[0].token_ids == expected
    assert probes.CALLS["attention"] >= 5 * 2  # five steps, two layers


def test_no_provider_is_called_while_tokens_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_di.containers import fill

    calls = 0
    plain = fill._provider

    def counting(*args: object, **kwargs: object) -> object:
        provider = plain(*args, **kwargs)  # type: ignore[arg-type]

        def count(*_: object, **__: object) -> None:
            nonlocal calls
            calls += 1

        return _counted(provider, count)

    monkeypatch.setattr(fill, "_provider", counting)
    with LLM(overrides=TINY) as llm:
        assert calls > 0
        calls = 0
        llm.generate(["hello", "again"], GREEDY)
    assert calls == 0


def _counted(provider: object, count: Callable[..., None]) -> object:
    from dependency_injector.providers import Callable as CallableProvider

    def call() -> object:
        count()
        return provider()  # type: ignore[operator]

    return CallableProvider(call)


async def _ask(assembly: Assembly, client: LocalEngineClient, port: int) -> tuple[int, Any]:
    """One chat request to a server on a loopback port."""
    with opened(ServerContainer, assembly, engine_client=client) as container:
        running = asyncio.create_task(container.server().run())
        try:
            body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4})
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            reader, writer = await _connect(port, running)
            writer.write((head + body).encode())
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
            lines, _, content = answer.partition(b"\r\n\r\n")
            return int(lines.split()[1]), json.loads(content)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def _connect(
    port: int, server: asyncio.Task[None]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while not server.done():
        try:
            return await asyncio.open_connection("127.0.0.1", port)
        except ConnectionError:
            await asyncio.sleep(0.02)
    raise AssertionError(f"the server has ended: {server}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
