"""The Responses API: through OpenAI's own client, and as bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from tests.server.fakes import EchoEngine, make_server, with_client
from tests.server.tag_parsers import TagToolParser, ThinkParser
from tests.server.test_parsers import Speaker

from vllm_di.errors import RequestError
from vllm_di.server.responses.request import (
    AS_THEY_ARE,
    ResponsesRequest,
    chat_request,
    messages_of,
)
from vllm_di.server.responses.store import ResponseStore

RESPONSES = "/v1/responses"
TOOLS: list[Any] = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
CALL = '<tool_call>{"name": "f", "arguments": {"a": "b c"}}</tool_call>'
TEXT = f"<think>so</think>Well. {CALL}\n{CALL}"

Test = Callable[[openai.AsyncOpenAI], Awaitable[None]]


def ask(text: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "max_output_tokens": 20, "input": text, **fields}


def with_openai(test: Test, engine: EchoEngine, **settings: Any) -> None:
    """Run an async test with OpenAI's client and a server in this process."""

    async def main() -> None:
        client = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(make_server(engine, **settings).app)
        )
        async with openai.AsyncOpenAI(
            base_url="http://localhost/v1", api_key="k", http_client=client, max_retries=0
        ) as api:
            await test(api)
        assert not engine.live

    asyncio.run(main())


def speaks(reason: str = "stop") -> dict[str, Any]:
    return {
        "engine": Speaker([TEXT], reason),
        "tool_parser": TagToolParser(streams=True),
        "reasoning_parser": ThinkParser(),
    }


def test_a_response_is_kept() -> None:
    async def test(api: openai.AsyncOpenAI) -> None:
        response = await api.responses.create(**ask(metadata={"a": "b"}))
        assert response.output_text == "hello" * 4
        assert (response.status, response.model) == ("incomplete", "echo")
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.usage is not None
        assert (response.usage.input_tokens, response.usage.output_tokens) == (5, 20)
        assert response.usage.input_tokens_details.cached_tokens == 1
        again = await api.responses.retrieve(response.id)
        assert again.model_dump() == response.model_dump()
        await api.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError, match="is not here"):
            await api.responses.retrieve(response.id)
        unkept = await api.responses.create(**ask(store=False))
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(unkept.id)

    with_openai(test, EchoEngine())


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_stream_equals_the_whole(reason: str) -> None:
    """Reasoning, text and two calls; items come one after another, events are numbered."""
    fields = ask("hi", tools=TOOLS)

    async def test(api: openai.AsyncOpenAI) -> None:
        whole = await api.responses.create(**fields)
        events = [event async for event in await api.responses.create(**fields, stream=True)]
        assert [event.sequence_number for event in events] == [*range(len(events))]
        kinds = [event.type for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        status = "completed" if reason == "stop" else "incomplete"
        assert kinds[-1] == f"response.{status}"
        streamed = events[-1].response
        assert [item.type for item in streamed.output] == [
            "reasoning",
            "message",
            "function_call",
            "function_call",
        ]
        assert kinds.count("response.output_item.added") == 4
        assert kinds.count("response.output_item.done") == 4
        plain = [r.model_dump(exclude={"id", "created_at"}) for r in (whole, streamed)]
        for item in [item for r in plain for item in r["output"]]:
            item.pop("id")
            item.pop("call_id", None)
        assert plain[0] == plain[1]
        assert whole.status == status
        assert whole.output_text == "Well. "
        assert whole.output[2].arguments == '{"a": "b c"}'
        said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert said == "Well. "
        called = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(called) == '{"a": "b c"}' * 2
        if reason == "length":
            return  # the client's helper takes an incomplete response for a failure
        async with api.responses.stream(**fields) as stream:
            assert (await stream.get_final_response()).output_text == "Well. "

    with_openai(test, **speaks(reason))


def test_a_conversation_goes_on() -> None:
    """The echo's prompt is the text of all messages; instructions are not carried on."""

    async def test(api: openai.AsyncOpenAI) -> None:
        first = await api.responses.create(**ask("ab", max_output_tokens=2, instructions="x"))
        assert first.output_text == "xa"
        going_on = {"previous_response_id": first.id, "max_output_tokens": 6}
        second = await api.responses.create(**ask("cd", **going_on))
        assert second.output_text == "abxacd"
        assert second.previous_response_id == first.id
        with pytest.raises(openai.NotFoundError) as refused:
            await api.responses.create(**ask("cd", previous_response_id="resp-x"))
        assert refused.value.param == "previous_response_id"

    with_openai(test, EchoEngine())


def test_items_of_a_conversation() -> None:
    """What an assistant thought, said and called is one message."""
    items: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"role": "assistant", "content": " Closely."},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
    ]
    function = {"name": "f", "arguments": "{}"}
    assert messages_of(items) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {
            "role": "assistant",
            "content": "I look. Closely.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]


def test_one_in_the_background() -> None:
    engine = EchoEngine(patience=2)

    async def test(api: openai.AsyncOpenAI) -> None:
        begun = await api.responses.create(**ask(background=True))
        assert begun.status == "in_progress"
        await engine.until_waiting(1)
        with pytest.raises(openai.BadRequestError, match="has not ended"):
            await api.responses.create(**ask(previous_response_id=begun.id))
        ended = await api.responses.cancel(begun.id)
        assert (ended.status, ended.output_text) == ("cancelled", "")
        assert not engine.live
        assert (await api.responses.cancel(begun.id)).status == "cancelled"
        other = await api.responses.create(**ask(background=True))
        await engine.until_waiting(1)
        engine.go_on.set()
        while (got := await api.responses.retrieve(other.id)).status == "in_progress":
            await asyncio.sleep(0)
        assert (got.status, got.output_text) == ("incomplete", "hello" * 4)
        whole = await api.responses.create(**ask())
        with pytest.raises(openai.BadRequestError, match="background"):
            await api.responses.cancel(whole.id)
        engine.go_on.clear()
        third = await api.responses.create(**ask(background=True))
        await engine.until_waiting(1)
        engine.die("lost")
        while (got := await api.responses.retrieve(third.id)).status == "in_progress":
            await asyncio.sleep(0)
        assert got.status == "failed"
        assert got.error is not None
        assert got.error.message == "the engine died: lost"

    with_openai(test, engine)


def test_other_keys_see_nothing(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")

    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        own, other = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        name = (await client.post(RESPONSES, json=ask(), headers=own)).json()["id"]
        url = f"{RESPONSES}/{name}"
        assert (await client.get(url, headers=own)).status_code == 200
        assert (await client.get(url, headers={"x-api-key": "one"})).status_code == 200
        for method, path in [("GET", url), ("DELETE", url), ("POST", f"{url}/cancel")]:
            assert (await client.request(method, path, headers=other)).status_code == 404
        body = ask(previous_response_id=name)
        assert (await client.post(RESPONSES, json=body, headers=other)).status_code == 404

    with_client(test, api_key_file=str(keys))


def test_the_store_is_bounded() -> None:
    store = ResponseStore(10_000)
    for index in range(50):
        store.put(b"a", {"id": str(index), "text": "x" * 500}, [])
        store.put(b"b", {"id": str(index)}, [])
    with pytest.raises(RequestError, match="response_store_bytes"):
        store.get(b"a", "40")
    assert store.get(b"a", "45")
    assert store.get(b"b", "45")
    store.put(b"a", {"id": "large", "text": "x" * 20_000}, [])
    with pytest.raises(RequestError):
        store.get(b"a", "large")


def test_what_was_replaced_or_deleted_takes_no_room() -> None:
    store = ResponseStore(4_000)
    for index in range(20):
        store.put(b"a", {"id": "one", "index": index}, [])
        store.put(b"a", {"id": f"other {index}"}, [])
        store.delete(b"a", f"other {index}")
    store.put(b"a", {"id": "two"}, [])
    assert all(store.get(b"a", name) for name in ("one", "two"))


def test_a_stream_that_fails_ends_with_an_error() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        asking = asyncio.create_task(client.post(RESPONSES, json=ask("a", stream=True)))
        await engine.until_waiting(1)
        engine.die("lost")
        last = (await asking).text.strip().split("\n\n")[-1]
        assert last.startswith("event: error\n")
        assert "the engine died: lost" in last

    with_client(test, engine={"patience": 2})


def test_fields_that_clients_send_and_that_change_nothing() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        body = ask(truncation="auto", max_tool_calls=3, include=["reasoning.encrypted_content"])
        del body["model"]
        answer = await client.post(RESPONSES, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "echo"

    with_client(test)


def test_fields_of_a_chat_request_reach_the_engine() -> None:
    fields: dict[str, Any] = {
        "top_k": 3,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.5,
        "logit_bias": {"65": 2.0},
        "seed": 7,
        "stop": ["zzz"],
        "stop_token_ids": [66],
        "min_tokens": 1,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "priority": 4,
        "cache_salt": "salt",
    }

    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        answer = await client.post(RESPONSES, json=ask() | fields)
        assert answer.status_code == 200, answer.text
        (request,) = engine.requests
        wanted = fields | {"logit_bias": {65: 2.0}}
        found = {
            n: getattr(request.params, n) for n in wanted if n not in ("priority", "cache_salt")
        }
        assert found | {"priority": request.priority, "cache_salt": request.cache_salt} == wanted

    with_client(test)
    others = {"structured_outputs", "chat_template_kwargs", "thinking_token_budget"}
    others |= {"model", "stream", "temperature", "top_p", "parallel_tool_calls"}
    assert {*AS_THEY_ARE} == {*fields} | others
    asked = ResponsesRequest(input="x", thinking_token_budget=5, chat_template_kwargs={"a": 1})
    chat = chat_request(asked, [{"role": "user", "content": "x"}])
    assert (chat.thinking_token_budget, chat.chat_template_kwargs) == (5, {"a": 1})


IMAGE = {"type": "input_image", "image_url": "http://x/y.png"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "empty"),
        ({"input": [{"type": "mesage"}]}, "input", "did you mean 'message'"),
        ({"input": [{"role": "usr", "content": "x"}]}, "input", "did you mean 'user'"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input", "input_image"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", r"input\[0\].*call_id"),
        ({"max_output_tokens": 0}, "max_output_tokens", ">= 1"),
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tools": TOOLS}, "tools", "tool_parser=none"),
        ({"reasoning": {"effort": "high"}}, "reasoning_effort", "reasoning_parser=none"),
        ({"text": {"format": {"type": "json_object"}}}, "response_format", "structured"),
        ({"truncation": "most"}, "truncation", "auto or disabled"),
        ({"include": ["message.output_text.logprobs"]}, "include", "logprobs is not supported"),
        ({"top_k": -5}, "top_k", "must be in"),
        ({"conversation": "c"}, "conversation", "not supported"),
        ({"background": True, "stream": True}, "background", "without stream"),
        ({"background": True, "store": False}, "background", "store=true"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "length"),
    ],
)
def test_bad_input(fields: dict[str, Any], param: str, words: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        response = await client.post(RESPONSES, json=ask() | fields)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(error["message"])

    with_client(test)
