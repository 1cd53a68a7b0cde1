"""Budgets of thought and grammars behind thoughts, from the request to the tokens of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from anthropic import Anthropic
from openai import OpenAI
from tests.containers.two_platforms import config_dir
from tests.server.fakes import EchoEngine, chat, client_of, make_server, with_client
from tests.server.served import served
from tests.server.tag_parsers import ThinkParser

from vllm_di import LLM, SamplingParams
from vllm_di.components.interfaces import ParserRequest
from vllm_di.components.messages import SamplingParams as Params
from vllm_di.components.reasoning_parser.tags import (
    DeepseekR1Parser,
    GraniteReasoningParser,
    Qwen3Parser,
)
from vllm_di.components.structured_output.thought import Thought
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.errors import RequestError
from vllm_di.server.protocol import ChatRequest
from vllm_di.server.thought import template_kwargs, thinking_budget, with_thought

CLOSE = [*b"</think>"]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "maximum": 20}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "keep", "parameters": SCHEMA}}
SETTINGS = ["model=tiny", "platform=cpu", "model.dtype=float32", "reasoning_parser=deepseek_r1"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(SETTINGS) as address:
        yield address


def ask(url: str, **fields: Any) -> Any:
    body = {"max_tokens": 60, "seed": 1, "return_token_ids": True, **fields}
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json={"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **body},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def closed_after(token_ids: list[int]) -> int:
    """Tokens before the closing mark."""
    places = (i for i in range(len(token_ids)) if token_ids[i : i + len(CLOSE)] == CLOSE)
    return next(places, len(token_ids))


@pytest.mark.parametrize("budget", [0, 7])
def test_the_budget_closes_every_choice(url: str, budget: int) -> None:
    for choice in ask(url, thinking_token_budget=budget, n=3)["choices"]:
        assert closed_after(choice["token_ids"]) == budget
        assert len(choice["token_ids"]) > budget + len(CLOSE), "the answer goes on"
        assert ("reasoning_content" in choice["message"]) == (budget > 0)
    (free,) = ask(url)["choices"]
    assert closed_after(free["token_ids"]) > 40


def test_a_schema_is_obeyed_behind_the_thought(url: str) -> None:
    for choice in ask(url, thinking_token_budget=9, response_format=FORMAT, n=3)["choices"]:
        assert closed_after(choice["token_ids"]) == 9
        assert json.loads(choice["message"]["content"])["kind"] in ("cat", "dog")
        assert choice["message"]["reasoning_content"]
        assert choice["finish_reason"] == "stop"
    (cut,) = ask(url, response_format=FORMAT)["choices"]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("", "length"), "a thought alone"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "keep"}}])
def test_calls_that_must_come_behind_a_thought(url: str, choice: Any) -> None:
    fields = {"tools": [TOOL], "tool_choice": choice, "thinking_token_budget": 5}
    (only,) = ask(url, parallel_tool_calls=False, max_tokens=120, **fields)["choices"]
    (call,) = only["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["kind"] in ("cat", "dog")
    assert only["message"]["reasoning_content"]


def test_openai_streams_both(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            extra_body={
                "response_format": FORMAT,
                "thinking": {"type": "enabled", "budget_tokens": 6},
            },
            max_tokens=80,
            stream=True,
        )
        deltas = [chunk.choices[0].delta for chunk in stream]
    thoughts = [hasattr(delta, "reasoning_content") for delta in deltas]
    assert thoughts.index(True) < len(thoughts) - 1
    assert json.loads("".join(delta.content or "" for delta in deltas))["age"] <= 20


def test_anthropic_gets_its_budget(url: str) -> None:
    with Anthropic(base_url=url, api_key="none") as client:
        message = client.messages.create(
            model="tiny",
            max_tokens=60,
            messages=[{"role": "user", "content": "hi"}],
            thinking={"type": "enabled", "budget_tokens": 30},
            stop_sequences=["</think>"],  # what an untrained model says behind it is of no interest
            extra_body={"temperature": 0},
        )
    assert message.content[0].type == "thinking"
    assert message.usage.output_tokens == 30 + len(CLOSE)


VARIANTS = [
    [
        "scheduler.max_num_batched_tokens=16",
        "scheduler.max_num_seqs=3",
        "drafter._target_=tests.growth.parts.PromptLookup",
    ],
    ["executor=multiprocess", "executor.tensor_parallel_size=2"],
    ["platform=two"],  # a pipeline of two stages
    ["platform=two", "executor.processes=true"],
    ["worker.num_blocks=16", "kv_layout.block_size=16", "model.max_model_len=160"],
]


def test_however_the_steps_are_cut(tmp_path: Path) -> None:
    """Chunked prompts, drafts, two ranks, a pipeline and preemption give the tokens of a plain
    run."""
    folders = [config_dir(tmp_path)]
    thought = msgspec.to_builtins(
        Thought(
            begins="inside", opening=["<think>"], closing=["</think>"], closing_ids=CLOSE, budget=13
        )
    )
    asked = [
        {"thought": thought},
        {"response_format": FORMAT, "thought": thought},
        {"structured_outputs": {"regex": "([a-f]{5}-){9}"}, "thought": thought},
    ]
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=90, structured_output=asked[i % 3])
        for i in range(6)
    ]
    found, preemptions = [], []
    for overrides in [[], *VARIANTS]:
        settings = ["platform=cpu", "model.dtype=float32", "trust=[tests]", *overrides]
        with LLM("tiny", overrides=settings, config_dirs=folders) as llm:
            done = llm.generate(["ab</think>" * (i + 1) for i in range(6)], params)
            found.append([one.outputs[0].token_ids for one in done])
            preemptions.append(llm.engine.step().stats.num_preemptions)
    assert preemptions[-1] > 0 == preemptions[0]
    assert all(answers == found[0] for answers in found)
    assert [closed_after(ids) for ids in found[0]] == [13] * 6


def made(parser: Any, prompt: str = "", **fields: Any) -> tuple[dict[str, Any] | None, bool]:
    request = ChatRequest(messages=[{}], **fields)
    wanted = {"response_format": request.response_format} if request.response_format else None
    params, may_think = with_thought(
        Params(structured_output=wanted),
        request,
        parser,
        ParserRequest({}, prompt),
        BytesTokenizer(vocab_size=300),
    )
    return params.structured_output, may_think


def test_when_a_grammar_waits() -> None:
    json_object: dict[str, Any] = {"response_format": {"type": "json_object"}}
    assert made(Qwen3Parser()) == (None, True)
    assert made(ThinkParser(), **json_object) == (json_object, False)
    assert made(Qwen3Parser(), "<think></think>", **json_object) == (json_object, False)
    asked, may_think = made(Qwen3Parser(), "<think>", **json_object)
    assert asked is not None and asked["thought"]["begins"] == "inside" and may_think
    # marks of several tokens, as those of BytesTokenizer: only where a thought is wanted
    assert made(GraniteReasoningParser(), **json_object) == (json_object, False)
    kwargs: dict[str, Any] = {"chat_template_kwargs": {"thinking": True}}
    asked, may_think = made(GraniteReasoningParser(), **json_object, **kwargs)
    assert asked is not None and len(asked["thought"]["opening_ids"]) == 2 and may_think
    off: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
    assert made(Qwen3Parser(), **json_object, **off) == (json_object, False)
    asked, _ = made(DeepseekR1Parser(), reasoning_effort="low", thinking_token_budget=4)
    assert asked is not None and asked["thought"]["budget"] == 4


def test_fields_that_say_how_to_think() -> None:
    def request(**fields: Any) -> ChatRequest:
        return ChatRequest(messages=[{}], **fields)

    assert thinking_budget(request()) is None
    assert thinking_budget(request(thinking={"type": "enabled", "budget_tokens": 5})) == 5
    assert thinking_budget(request(thinking_token_budget=0)) == 0
    assert template_kwargs(request(thinking={"type": "disabled"})) == {"enable_thinking": False}
    assert template_kwargs(request(reasoning_effort="none"))["enable_thinking"] is False
    for wrong in ({"type": "enabled", "budget_tokens": -1}, {"type": "on"}, 3):
        with pytest.raises(RequestError) as caught:
            thinking_budget(request(thinking=wrong))
        assert caught.value.param == "thinking"


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        for fields, param in (
            ({"thinking_token_budget": 5}, "thinking_token_budget"),
            ({"thinking_token_budget": 0}, "thinking_token_budget"),
            ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking"),
        ):
            for by in (client, client_of(make_server(engine, reasoning_parser=ThinkParser()))):
                answer = await by.post("/v1/chat/completions", json=chat(**fields))
                assert answer.status_code == 400
                assert answer.json()["error"]["param"] == param

    with_client(test)
