"""Prompts on one platform, tokens from another: the tokens of either alone, over HTTP too, and
choices that reach both roles or one."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from typing import Any

import httpx
import psutil
import pytest
from tests.own_process import OwnProcess
from tests.server.served import served

from vllm_di import LLM, SamplingParams
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain

CHECKS = OwnProcess("tests.ports.split_checks")
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROMPTS = ["a", "hello world", "x" * 70, "x" * 70 + "y" * 80]
SMALL = ("worker.num_blocks=128", "scheduler.max_num_batched_tokens=64", "model.max_model_len=512")


def tokens(*overrides: str) -> list[list[int]]:
    few = (*SMALL, "scheduler.max_num_seqs=8")
    with LLM("tiny", overrides=[*few, *overrides]) as llm:
        return [answer.outputs[0].token_ids for answer in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def want() -> list[list[int]]:
    return tokens("platform=cpu", "model.dtype=float32")


@pytest.mark.parametrize("platform", ["split_cpu_openvino", "split_openvino_cpu"])
def test_the_tokens_are_those_of_either_platform(platform: str, want: list[list[int]]) -> None:
    pytest.importorskip("openvino")
    assert tokens(f"platform={platform}") == want


def test_a_cache_of_bytes_is_handed_over_as_floats(want: list[list[int]]) -> None:
    pytest.importorskip("openvino")
    found = tokens("platform=split_openvino_cpu", "prefill.kv_layout.dtype=uint8")
    assert [len(one) for one in found] == [len(one) for one in want]


@pytest.mark.parametrize("name", CHECKS.names)
def test_prompts_on_a_simulated_npu(name: str) -> None:
    CHECKS.result(name)


@pytest.mark.parametrize(
    ("overrides", "classes"),
    [
        ((), ("PagedAttention", "OpenVinoAttention")),
        (("attention=sdpa",), ("SdpaAttention", "SdpaAttention")),
        (("decode.attention=sdpa",), ("PagedAttention", "SdpaAttention")),
        (("prefill.attention=hybrid",), ("HybridAttention", "OpenVinoAttention")),
    ],
)
def test_choices_reach_both_roles_or_one(
    overrides: tuple[str, ...], classes: tuple[str, str]
) -> None:
    chosen = assemble(["platform=split_cpu_openvino", "model=tiny", *overrides])
    told: Any = explain(chosen, ops=False)
    shown = {row.slot: row.target.rpartition(".")[2] for row in told.rows}
    assert (shown["prefill.attention"], shown["decode.attention"]) == classes
    assert shown["decode.program"] == "OpenVinoProgram"
    assert shown["kv_transfer"] == "SharedMemoryTransfer"


def kill_a_prompt_worker() -> None:
    """Of the server that this process has started."""
    for process in psutil.Process().children(recursive=True):
        words = process.cmdline()
        if any(
            word.startswith("{") and json.loads(word).get("role") == "prefill" for word in words
        ):
            os.kill(process.pid, signal.SIGKILL)
            return
    pytest.fail("there is no worker of prompts")


async def ask(client: httpx.AsyncClient, index: int, patience: float | None) -> str | None:
    """The answer to one of four questions; None where the client hung up before it."""
    country = ("France", "Italy", "Spain", "Japan")[index % 4]
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": f"What is the capital of {country}?"}],
        "temperature": 0,
        "max_tokens": 8 + 4 * (index % 3),
    }
    try:
        answer = await client.post("/v1/chat/completions", json=body, timeout=patience)
    except httpx.TimeoutException:
        return None
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


async def under_load(address: str) -> list[str | None]:
    """200 questions, some of which are given up; a worker of prompts is killed meanwhile."""
    chance = random.Random(0)
    async with httpx.AsyncClient(
        base_url=address, limits=httpx.Limits(max_connections=24)
    ) as client:
        first = [await ask(client, index, None) for index in range(12)]
        given_up = [chance.random() < 0.1 for _ in range(200)]
        tasks = [
            asyncio.create_task(ask(client, index, 0.3 if early else None))
            for index, early in enumerate(given_up)
        ]
        await tasks[20]
        kill_a_prompt_worker()
        answers = await asyncio.gather(*tasks)
        for index, answer in enumerate(answers):
            if not given_up[index]:
                assert answer == first[index % 12]
        health = await client.get("/health")
        assert health.status_code == 200, health.text
        assert "\nvllm:num_requests_running{" in (await client.get("/metrics")).text
        return first


@pytest.mark.slow
def test_the_capital_over_http_while_a_worker_is_killed() -> None:
    pytest.importorskip("openvino")
    with LLM("smollm2", overrides=["platform=cpu", "model.dtype=float32"]) as llm:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        alone = llm.chat(question, SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
    split = ["platform=split_cpu_openvino", "executor.processes=true", "worker.num_blocks=256"]
    with served(["model=smollm2", "model.max_model_len=2048", *split]) as address:
        first = asyncio.run(under_load(address))
    assert first[0] == alone
    assert "Paris" in (first[8] or "")
