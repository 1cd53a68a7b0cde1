"""The Messages API: through Anthropic's own client, and as bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import pytest
from tests.server.fakes import EchoEngine, make_server, with_client
from tests.server.tag_parsers import TagToolParser, ThinkParser
from tests.server.test_parsers import Speaker

from vllm_di.errors import RequestError
from vllm_di.server.anthropic.errors import anthropic_error
from vllm_di.server.anthropic.request import ConversationRequest, MessagesRequest, chat_request
from vllm_di.server.protocol import decode

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
TOOLS: list[Any] = [{"name": "f", "description": "d", "input_schema": {"type": "object"}}]
CALL = '<tool_call>{"name": "f", "arguments": {"a": "b c"}}</tool_call>'
TEXT = f"<think>so</think>Well. {CALL}\n{CALL}"


def ask(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": "echo", "max_tokens": 20, "messages": messages, **fields}


def with_anthropic(
    test: Callable[[anthropic.AsyncAnthropic], Awaitable[None]],
    engine: EchoEngine,
    **settings: Any,
) -> None:
    """Run an async test with Anthropic's client and a server in this process."""

    async def main() -> None:
        transport = httpx2.ASGITransport(make_server(engine, **settings).app)
        client = httpx2.AsyncClient(transport=transport)
        async with anthropic.AsyncAnthropic(
            base_url="http://localhost", api_key="first-key", http_client=client, max_retries=0
        ) as api:
            await test(api)

    asyncio.run(main())


def speaks(text: str = TEXT, reason: str = "stop") -> dict[str, Any]:
    return {
        "engine": Speaker([text], reason),
        "tool_parser": TagToolParser(streams=True),
        "reasoning_parser": ThinkParser(),
    }


def test_a_key_of_anthropics_clients(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first-key\n")

    async def test(api: anthropic.AsyncAnthropic) -> None:
        message = await api.messages.create(**ask(stop_sequences=["lo"]))
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "lo")
        with pytest.raises(anthropic.AuthenticationError, match="x-api-key"):
            await api.with_options(api_key="other").messages.create(**ask())

    with_anthropic(test, EchoEngine(), api_key_file=str(keys))


def test_a_message() -> None:
    async def test(api: anthropic.AsyncAnthropic) -> None:
        message = await api.messages.create(**ask())
        (block,) = message.content
        assert block.type == "text"
        assert block.text == "hello" * 4
        assert (message.role, message.model, message.type) == ("assistant", "echo", "message")
        assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens) == (4, 1)
        assert usage.output_tokens == 20
        counted = await api.messages.count_tokens(model="echo", messages=ask()["messages"])
        assert counted.input_tokens == 5

    with_anthropic(test, EchoEngine())


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_streamed_message_equals_the_whole_one(reason: str) -> None:
    """Reasoning, text and two tool calls; blocks come one after another."""
    fields = ask("hi", tools=TOOLS)

    async def test(api: anthropic.AsyncAnthropic) -> None:
        whole = await api.messages.create(**fields)
        async with api.messages.stream(**fields) as stream:
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_message()
        assert [b.type for b in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert whole.content[1].text == "Well. "
        calls = [block for block in whole.content if block.type == "tool_use"]
        assert [(call.name, call.input) for call in calls] == [("f", {"a": "b c"})] * 2
        assert len({call.id for call in calls}) == 2
        assert whole.stop_reason == ("tool_use" if reason == "stop" else "max_tokens")
        plain = [m.model_dump(exclude={"id"}) for m in (whole, streamed)]
        for block in [b for m in plain for b in m["content"]]:
            for random in ("id", "parsed_output", "citations"):
                block.pop(random, None)
        assert plain[0] == plain[1]
        assert kinds[0] == "message_start"
        assert kinds[-1] == "message_stop"
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4

    with_anthropic(test, **speaks(reason=reason))


def test_the_order_of_events() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        response = await client.post(MESSAGES, json=ask("a", max_tokens=2, stream=True))
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [part.split("\n") for part in response.text.strip().split("\n\n")]
        shapes = [json.loads(data.removeprefix("data: ")) for _, data in events]
        assert [name.removeprefix("event: ") for name, _ in events] == [s["type"] for s in shapes]
        assert [shape["type"] for shape in shapes] == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert shapes[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}

    with_client(test)


def test_a_stream_that_fails_ends_with_an_error() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        asking = asyncio.create_task(client.post(MESSAGES, json=ask("a", stream=True)))
        await engine.until_waiting(1)
        engine.die("lost")
        last = (await asking).text.strip().split("\n\n")[-1]
        name, data = last.split("\n")
        assert name == "event: error"
        assert json.loads(data.removeprefix("data: ")) == {
            "type": "error",
            "error": {"type": "overloaded_error", "message": "the engine died: lost"},
        }

    with_client(test, engine={"patience": 2})


def translated(**fields: Any) -> dict[str, Any]:
    body = json.dumps(ask(**fields)).encode()
    request = chat_request(decode(body, MessagesRequest, max_depth=64)[0])
    return {k: getattr(request, k) for k in request.__struct_fields__}


def test_a_conversation_with_tools() -> None:
    """As OpenAI's clients would send it."""
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "is_error": True,
                    "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "3"}],
                },
                {"type": "tool_result", "tool_use_id": "t2", "content": "4"},
                {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}},
            ],
        },
        {"role": "assistant", "content": "So"},
    ]
    got = translated(
        messages=conversation,
        system=[{"type": "text", "text": "be brief"}],
        tools=TOOLS,
        tool_choice={"type": "tool", "name": "f"},
        stop_sequences=["x"],
        top_k=3,
    )
    function = {"name": "f", "arguments": '{"a":1}'}
    assert got["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "2\n3"},
        {"role": "tool", "tool_call_id": "t2", "content": "4"},
        {"role": "user", "content": [{"type": "text", "text": "go on"}]},
        {"role": "assistant", "content": "So"},
    ]
    assert got["continue_final_message"] is True
    described = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert got["tools"] == [{"type": "function", "function": described}]
    assert got["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert (got["stop"], got["top_k"], got["max_tokens"]) == (["x"], 3, 20)


def test_thinking_and_output() -> None:
    got = translated(thinking={"type": "enabled", "budget_tokens": 1024})
    assert got["thinking_token_budget"] == 1024
    assert got["chat_template_kwargs"] == {"enable_thinking": True}
    got = translated(thinking={"type": "disabled"})
    assert got["thinking"] is None
    assert got["chat_template_kwargs"] == {"enable_thinking": False}
    schema = {"type": "object"}
    wanted = {"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    got = translated(output_config=wanted)
    assert got["reasoning_effort"] == "low"
    assert got["response_format"]["json_schema"]["schema"] == schema


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": [{"role": "system", "content": "x"}]}, "goes into system"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "did you mean 'user'"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            r"messages\[0\].content\[0\]: image",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "video"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}
                        ],
                    }
                ]
            },
            r"content\[0\].content\[0\]: image is not supported",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result"}]}]},
            "tool_use_id",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
        ({"tool_choice": {"type": "some"}}, "auto, any, none"),
        ({"tools": TOOLS}, "tool_parser=none"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"thinking": {"type": "on"}}, "enabled, disabled"),
        ({"output_config": {"format": {"type": "xml"}}}, "json_schema"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"model": "other"}, "does not exist"),
    ],
)
def test_bad_input(fields: dict[str, Any], words: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        response = await client.post(MESSAGES, json=ask() | fields)
        assert response.status_code in (400, 404)
        body = response.json()
        assert body["type"] == "error"
        expected = "not_found_error" if response.status_code == 404 else "invalid_request_error"
        assert body["error"]["type"] == expected
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(body["error"]["message"])
        assert not engine.requests

    with_client(test)


def test_other_errors_have_the_same_form() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        for response in (await client.get(MESSAGES), await client.post(MESSAGES, content=b"{")):
            assert response.json()["type"] == "error"
        assert (await client.post("/v1/messages/nothing")).json()["type"] == "error"

    with_client(test)
    for status in (400, 401, 403, 404, 413, 415, 429, 500, 503, 504):
        error = json.loads(anthropic_error(RequestError("m", param="p", status=status)))
        assert error["error"]["message"] == "p: m"


def test_a_call_without_valid_arguments_is_kept() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": '

    async def test(api: anthropic.AsyncAnthropic) -> None:
        message = await api.messages.create(**ask("hi", tools=TOOLS))
        (call,) = message.content
        assert call.type == "tool_use"
        assert call.input == {"__invalid_json__": '{"a": '}
        assert message.stop_reason == "max_tokens"

    with_anthropic(test, **speaks(text, "length"))


def test_counting_takes_what_messages_take() -> None:
    names = set(ConversationRequest.__struct_fields__)
    assert names <= set(MessagesRequest.__struct_fields__)
