"""Answers that go through parsers: streamed and whole ones agree, however the text is cut."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.fakes import CHAT, EchoEngine, chat, client_of, make_server
from tests.server.tag_parsers import TagToolParser, ThinkParser
from tests.server.test_chat import events

from vllm_di.components.interfaces import (
    ParserEvent,
    ParserRequest,
    ParserState,
    ToolCallArguments,
    ToolCallBegun,
    ToolParser,
)
from vllm_di.components.messages import EngineRequest, TokenOutput
from vllm_di.components.reasoning_parser.none import NoReasoningParser
from vllm_di.server.parsing import ChoiceParser, MessageParts

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f"}}]
REQUEST = ParserRequest({"tools": TOOLS}, "hi")
F = '<tool_call>{"name": "f", "arguments": {"a": "}</tool_call\\"<", "b": {}}}</tool_call>'
G = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>so <tool_call> 你好</think>"
TEXTS = [
    "plain",
    THOUGHT + "yes",
    THOUGHT + F + " and " + G + "!",
    "<think>never closed" + G,
    "<tool_call>{no json}</tool_call>",
    '<tool_call>{"name": "f"}</tool_call>' + F,
    '<tool_call>[]</tool_call><tool_call>{"name": "f", "arguments": {"a": 1}',
    G + '<tool_call>{"name": "f", "arguments": {}, oh}</tool_call> <tool_cal <thin',
]
PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    F,
    G,
    "<",
    "{",
    "}",
    '"',
    "\\",
    "🙂",
]


def choice_parser(streams: bool) -> ChoiceParser:
    return ChoiceParser(ThinkParser(), TagToolParser(streams=streams), REQUEST)


def message(parser: ChoiceParser, deltas: Sequence[str]) -> dict[str, Any]:
    parts = MessageParts()
    for i, delta in enumerate(deltas, 1):
        parts.add(parser.feed(delta, is_last=i == len(deltas)))
    return without_ids(parts.message())


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls", [])
    assert len({call.pop("id") for call in calls}) == len(calls), "each has an id of its own"
    return message


def cut(text: str, places: Iterable[int]) -> list[str]:
    bounds = [0, *sorted(places), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_every_cut_in_two_and_single_characters(text: str, streams: bool) -> None:
    whole = message(choice_parser(streams), [text])
    for place in range(len(text) + 1):
        assert message(choice_parser(streams), cut(text, [place])) == whole
    assert message(choice_parser(streams), [*text]) == whole
    assert message(choice_parser(streams), [*text, ""]) == whole, "the end may come without text"


@settings(deadline=None)
@given(st.data(), st.booleans())
def test_every_split(data: st.DataObject, streams: bool) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=12)))
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    whole = message(choice_parser(streams), [text])
    assert message(choice_parser(streams), cut(text, places)) == whole


def test_what_is_found() -> None:
    want_f = {"a": '}</tool_call"<', "b": {}}
    for streams in (False, True):
        found = message(choice_parser(streams), [TEXTS[2]])
        assert found["reasoning_content"] == "so <tool_call> 你好"
        assert found["content"] == " and !"
        calls = [call["function"] for call in found["tool_calls"]]
        assert [call["name"] for call in calls] == ["f", "g"]
        assert [json.loads(call["arguments"]) for call in calls] == [want_f, {}]
        malformed = message(choice_parser(streams), [TEXTS[4]])
        assert malformed == {"role": "assistant", "content": TEXTS[4], "refusal": None}
    broken = message(choice_parser(True), [TEXTS[7]])
    assert broken["content"] == ", oh}</tool_call> <tool_cal <thin", "the rest of a streamed call"
    only_a_call = message(choice_parser(False), [G])
    assert only_a_call["content"] is None


def test_arguments_are_streamed() -> None:
    parser = choice_parser(True)
    half = F[: F.index("b")]
    first = parser.feed(half, is_last=False)
    assert first.calls[0].begun is not None
    told = "".join(first.calls[0].arguments)
    assert half.endswith(told)
    assert len(told) > 10
    rest = parser.feed(F[len(half) :], is_last=True)
    assert rest.calls[0].begun is None
    assert not rest.content


class Scripted(ToolParser, ParserState):
    """Gives these events at the first text."""

    def __init__(self, *told: ParserEvent) -> None:
        self._told = told

    def check(self, request: Any) -> None:
        pass

    def start(self, request: ParserRequest) -> ParserState:
        return self

    def feed(self, delta: str) -> Sequence[ParserEvent]:
        return self._told

    def finish(self) -> Sequence[ParserEvent]:
        return ()


BEGUN = ToolCallBegun(0, "id", "f")


@pytest.mark.parametrize(
    "told", [[BEGUN, BEGUN], [ToolCallArguments(0, "{")], [ToolCallBegun(1, "id", "f")]]
)
def test_a_parser_that_loses_count_is_an_error(told: list[ParserEvent]) -> None:
    parser = ChoiceParser(NoReasoningParser(), Scripted(*told), REQUEST)
    with pytest.raises(RuntimeError, match="calls had begun"):
        parser.feed("text", is_last=False)


class Speaker(EchoEngine):
    """Says text i to choice i, some tokens at a time; the choices take turns."""

    def __init__(self, texts: Sequence[str], finish_reason: str = "stop") -> None:
        super().__init__()
        self.texts, self.reason = texts, finish_reason

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        index = int(request.request_id.rpartition("-")[2]) if len(self.texts) > 1 else 0
        tokens, dice = [*self.texts[index].encode()], random.Random(index)
        self.requests.append(request)
        while tokens:
            count = dice.randint(1, 5)
            ids, tokens = tokens[:count], tokens[count:]
            await asyncio.sleep(0)
            yield TokenOutput(request_id=request.request_id, token_ids=ids)
        end: Any = self.reason
        token_ids = [257] if end == "stop" else []
        yield TokenOutput(request_id=request.request_id, token_ids=token_ids, finish_reason=end)


def ask(
    engine: EchoEngine, *bodies: dict[str, Any], tool_parser: ToolParser
) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        server = make_server(engine, tool_parser=tool_parser, reasoning_parser=ThinkParser())
        async with client_of(server) as client:
            return [await client.post(CHAT, json=body) for body in bodies]

    return asyncio.run(main())


def assembled(chunks: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """The choice that a client makes of a stream; ids and names may come once only."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    choice: dict[str, Any] = {"index": index, "message": message, "logprobs": None}
    calls: list[dict[str, Any]] = []
    for part in (c for chunk in chunks for c in chunk["choices"] if c["index"] == index):
        delta = part["delta"]
        for field in delta.keys() & {"content", "reasoning_content"}:
            message[field] = message.get(field, "") + delta[field]
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["id"]
                assert call["function"]["name"]
                calls.append({**call, "function": {**call["function"], "arguments": ""}})
            else:
                assert call.keys() == {"index", "function"}
                assert call["function"].keys() == {"arguments"}
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        choice |= {k: part[k] for k in ("finish_reason", "stop_reason") if k in part}
    if calls:
        assert [call.pop("index") for call in calls] == list(range(len(calls)))
        message["tool_calls"] = calls
        message["content"] = message["content"] or None
    return choice


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_streamed_and_whole_answers_agree(streams: bool, reason: str) -> None:
    """Eight choices at once, each with a text of its own."""
    body = chat("hi", n=len(TEXTS), tools=TOOLS)
    parser = TagToolParser(streams=streams)
    engine = Speaker(TEXTS, reason)
    whole, streamed = ask(engine, body, {**body, "stream": True}, tool_parser=parser)
    chunks = events(streamed)
    for index, choice in enumerate(whole.json()["choices"]):
        got = assembled(chunks, index)
        ids = [{c["id"] for c in x["message"].get("tool_calls", ())} for x in (choice, got)]
        assert not ids[0] & ids[1]
        without_ids(choice["message"])
        without_ids(got["message"])
        assert got == choice
        assert choice["message"] == message(choice_parser(streams), [TEXTS[index]])
        called = reason == "stop" and "tool_calls" in choice["message"]
        assert choice["finish_reason"] == ("tool_calls" if called else reason)
    assert [r.fields["tools"] for r in parser.requests] == [TOOLS] * 2 * len(TEXTS)
    assert {r.prompt for r in parser.requests} == {"hi"}
    assert not any(r.params.skip_special_tokens for r in engine.requests)


def test_reasoning_that_the_prompt_opened() -> None:
    (answer,) = ask(Speaker(["a</think>b"]), chat("x<think>"), tool_parser=TagToolParser())
    got = answer.json()["choices"][0]["message"]
    assert (got["reasoning_content"], got["content"]) == ("a", "b")


def test_without_tools_the_tool_parser_is_not_asked() -> None:
    engine, parser = Speaker([F]), TagToolParser()
    bodies = [chat("hi"), chat("hi", tools=[]), chat("hi", tools=TOOLS, tool_choice="none")]
    for answer in ask(engine, *bodies, tool_parser=parser):
        assert answer.json()["choices"][0]["message"]["content"] == F
    assert not parser.requests
    assert all(r.params.skip_special_tokens for r in engine.requests)


def test_a_request_may_hide_special_tokens_all_the_same() -> None:
    engine = Speaker(["yes"])
    body = chat("hi", tools=TOOLS, skip_special_tokens=True)
    ask(engine, body, tool_parser=TagToolParser())
    assert engine.requests[0].params.skip_special_tokens
