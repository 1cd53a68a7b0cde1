"""Chat completions, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from tests.server.fakes import CHAT, COMPLETIONS, EchoEngine, chat, completion, with_client

from vllm_di.components.chat_template.none import NoChatTemplate
from vllm_di.components.interfaces import ChatTemplate

Test = Callable[[httpx.AsyncClient, EchoEngine], Awaitable[None]]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events; the stream must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content", "") for c in choices)


def test_whole_answer() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        response = await client.post(CHAT, json=chat("hello", max_tokens=5))
        body = response.json()
        assert response.status_code == 200
        assert body["object"] == "chat.completion"
        assert body["id"].startswith("chatcmpl-")
        assert body["model"] == "echo"
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": "hello", "refusal": None}
        assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
        assert body["usage"] == {
            "prompt_tokens": 5,
            "completion_tokens": 5,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 1},
        }

    with_client(test)


def test_max_tokens_defaults_to_the_rest_of_the_context() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        body = (await client.post(CHAT, json=chat("hello"))).json()
        assert body["usage"]["completion_tokens"] == 256 - 5
        limited = chat("hello", max_tokens=9, max_completion_tokens=3)
        body = (await client.post(CHAT, json=limited)).json()
        assert body["usage"]["completion_tokens"] == 3

    with_client(test)


def test_stream_gives_the_same_text() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        text = "naïve 你好 🙂"
        request = chat(text, max_tokens=len(text.encode()), stream=True)
        chunks = events(await client.post(CHAT, json=request))
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert text_of(chunks) == text
        assert all("\ufffd" not in json.dumps(c, ensure_ascii=False) for c in chunks)
        assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
        assert len({c["id"] for c in chunks}) == 1
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * len(chunks[:-1])
        assert "usage" not in chunks[-1]

    with_client(test)


@pytest.mark.parametrize("continuous", [False, True])
def test_usage_in_a_stream(continuous: bool) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        options = {"include_usage": True, "continuous_usage_stats": continuous}
        request = chat("abc", max_tokens=3, stream=True, stream_options=options)
        *chunks, last = events(await client.post(CHAT, json=request))
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 3
        usages = [c["usage"] for c in chunks]
        if continuous:
            assert [u["completion_tokens"] for u in usages] == [1, 1, 2, 3]
        else:
            assert usages == [None] * len(chunks)

    with_client(test)


def test_several_texts() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        body = (await client.post(CHAT, json=chat("ab", n=3, max_tokens=4, seed=7))).json()
        assert [c["index"] for c in body["choices"]] == [0, 1, 2]
        assert {c["message"]["content"] for c in body["choices"]} == {"abab"}
        assert body["usage"]["completion_tokens"] == 12
        assert body["usage"]["prompt_tokens"] == 2
        assert [r.params.seed for r in engine.requests] == [7, 8, 9]
        assert [r.request_id[-2:] for r in engine.requests] == ["-0", "-1", "-2"]
        chunks = events(await client.post(CHAT, json=chat("ab", n=2, max_tokens=4, stream=True)))
        assert (text_of(chunks, 0), text_of(chunks, 1)) == ("abab", "abab")

    with_client(test)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_and_aborts_in_the_engine(stream: bool) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        request = chat("one two three", stop=["tw", "three"], max_tokens=100, stream=stream)
        response = await client.post(CHAT, json=request)
        if stream:
            chunks = events(response)
            choice, text = chunks[-1]["choices"][0], text_of(chunks)
        else:
            choice = response.json()["choices"][0]
            text = choice["message"]["content"]
        assert (text, choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", "tw")
        assert engine.aborted == [engine.requests[0].request_id]
        request["include_stop_str_in_output"] = True
        response = await client.post(CHAT, json=request)
        whole = text_of(events(response)) if stream else None
        assert (whole or response.json()["choices"][0]["message"]["content"]) == "one tw"

    with_client(test)


def test_logprobs() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        request = chat("é", max_tokens=2, logprobs=True, top_logprobs=2)
        body = (await client.post(CHAT, json=request)).json()
        first, second = body["choices"][0]["logprobs"]["content"]
        assert (first["bytes"], first["logprob"]) == ([0xC3], -0.5)
        assert second["bytes"] == [0xA9]
        assert [t["token"] for t in first["top_logprobs"]] == ["\ufffd", "A"]
        streamed = events(await client.post(CHAT, json={**request, "stream": True}))
        content = [
            entry
            for chunk in streamed
            for choice in chunk["choices"]
            for entry in (choice.get("logprobs") or {"content": []})["content"]
        ]
        assert content == [first, second]
        plain = (await client.post(CHAT, json=chat("a", max_tokens=1, logprobs=True))).json()
        assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []

    with_client(test)


def test_extensions_of_vllm() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        extensions = {
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "min_tokens": 2,
            "stop_token_ids": [3],
            "allowed_token_ids": [97, 98],
            "bad_words": ["x"],
            "logit_bias": {"97": 5},
            "priority": 4,
            "cache_salt": "s",
            "return_token_ids": True,
            "prompt_logprobs": 0,
        }
        body = (await client.post(CHAT, json=chat("ab", max_tokens=3, **extensions))).json()
        assert body["choices"][0]["token_ids"] == [97, 98, 97]
        assert body["prompt_token_ids"] == [97, 98]
        first, second = body["prompt_logprobs"]
        assert first is None
        assert second["98"] == {"logprob": -0.5, "rank": 1, "decoded_token": "b"}
        (request,) = engine.requests
        params = request.params
        assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.1, 1.1)
        assert (params.ignore_eos, params.min_tokens, params.stop_token_ids) == (True, 2, [3])
        assert params.allowed_token_ids == [97, 98]
        assert params.logit_bias == {97: 5.0}
        assert request.bad_words_token_ids == [[120], [32, 120]]
        assert (request.priority, request.cache_salt) == (4, "s")
        assert request.arrival_time > 1e9

    with_client(test)


def test_continue_final_message() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        request = chat("ab", max_tokens=2, continue_final_message=True)
        assert (await client.post(CHAT, json=request)).status_code == 200
        request["add_generation_prompt"] = True
        error = (await client.post(CHAT, json=request)).json()["error"]
        assert error["param"] == "continue_final_message"

    with_client(test)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"thinking_token_budget": 10}, "thinking_token_budget"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"structured_outputs": {"regex": "a+"}}, "response_format"),
    ({"guided_choice": ["a"]}, "response_format"),
    ({"best_of": 3}, "best_of"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"echo": True}, "echo"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_refused(
    fields: dict[str, Any], param: str, stream: bool
) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        response = await client.post(CHAT, json=chat(stream=stream, **fields))
        error = response.json()["error"]
        assert response.status_code == 400
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")
        assert error["type"] == "invalid_request_error"
        harmless: dict[str, Any] = {
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
        }
        assert (await client.post(CHAT, json=chat(max_tokens=2, **harmless))).status_code == 200

    with_client(test)


def test_a_silent_stream_gets_comments() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        request = chat("ab", max_tokens=2, stream=True)
        response = await client.post(CHAT, json=request)
        assert ": keep-alive\n\n" in response.text
        assert text_of(events(response)) == "ab"

    with_client(test, engine={"delay": 0.25}, keep_alive_seconds=0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_may_take_only_so_long(stream: bool) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        response = await client.post(CHAT, json=chat("ab", max_tokens=9, stream=stream))
        if stream:
            assert response.status_code == 200
            error = json.loads(response.text.split("data: ")[-1])["error"]
            assert "[DONE]" not in response.text
        else:
            assert response.status_code == 504
            error = response.json()["error"]
        assert error["code"] == "timeout"
        assert engine.aborted

    with_client(test, engine={"patience": 1}, request_timeout_seconds=0.5)


def test_without_chat_prompts_are_served() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        for path, body in ((CHAT, chat()), ("/tokenize", {"messages": chat()["messages"]})):
            response = await client.post(path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (400, "chat_not_supported")
            assert "chat_template=none" in error["message"]
        response = await client.post(COMPLETIONS, json=completion("ab", max_tokens=2))
        assert response.status_code == 200

    with_client(test, chat_template=NoChatTemplate())


class SlowTemplate(ChatTemplate):
    """Renders ``slow`` once it is let."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def render(self, messages: Any, **options: Any) -> str:
        text: str = messages[-1]["content"]
        if text == "slow":
            self.may_go_on.wait()
        return text


def test_a_slow_render_delays_no_other_request() -> None:
    template = SlowTemplate()

    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        slow = asyncio.create_task(client.post(CHAT, json=chat("slow", max_tokens=4)))
        for _ in range(3):
            answer = await client.post(CHAT, json=chat("fast", max_tokens=4))
            assert answer.json()["choices"][0]["message"]["content"] == "fast"
        assert not slow.done()
        template.may_go_on.set()
        assert (await slow).json()["choices"][0]["message"]["content"] == "slow"

    with_client(test, chat_template=template)
