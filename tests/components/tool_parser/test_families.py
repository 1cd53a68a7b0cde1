"""Answers as each family writes them: what is found, however the text is cut, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_di.components.interfaces import ParserRequest, ToolParser
from vllm_di.components.tool_parser.asked import read_tools
from vllm_di.components.tool_parser.families import family_of
from vllm_di.components.tool_parser.json_calls import (
    GraniteParser,
    HermesParser,
    Llama3JsonParser,
    MistralParser,
    Phi4Parser,
)
from vllm_di.components.tool_parser.text_calls import (
    LONGEST,
    GemmaParser,
    PythonicParser,
    Qwen3CoderParser,
)
from vllm_di.errors import RequestError
from vllm_di.server.parsing import ChoiceParser, MessageParts

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
ODD = r'{"city": "}]</tool_call>\"<[", "more": {"a": [1, {}]}}'
PARIS = {"city": "Paris", "days": 2}
W = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'
N = '{"name": "now", "arguments": {}}'
Found = tuple[str | None, list[tuple[str, Any]]]


def found(parser: ToolParser, pieces: list[str], *, stream: bool) -> Found:
    """Content, and the calls with their arguments read as JSON."""
    request = ParserRequest({"tools": TOOLS, "stream": stream}, "hi")
    choice, parts = ChoiceParser(None, parser, request), MessageParts()
    for i, piece in enumerate(pieces, 1):
        parts.add(choice.feed(piece, is_last=i == len(pieces)))
    message = parts.message()
    calls = message.get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    read = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]
    return message["content"], read


CASES: list[tuple[Callable[[], ToolParser], str, str | None, list[tuple[str, Any]]]] = [
    (HermesParser, "Just text.", "Just text.", []),
    (HermesParser, f"<tool_call>\n{W}\n</tool_call>", None, [("weather", PARIS)]),
    (
        HermesParser,
        f"I look. <tool_call>\n{W}\n</tool_call>\n<tool_call>\n{N}\n</tool_call>",
        "I look. ",
        [("weather", PARIS), ("now", {})],
    ),
    (
        HermesParser,
        '<tool_call>{"name": "weather", "arguments": ' + ODD + "}</tool_call> bye <tool_",
        "bye <tool_",
        [("weather", json.loads(ODD))],
    ),
    (
        HermesParser,
        '<tool_call>{"arguments": {"days": 1}, "name": "weather", "id": 7}</tool_call>',
        None,
        [("weather", {"days": 1})],
    ),
    (HermesParser, f"<tool_call>{W}", None, [("weather", PARIS)]),
    (HermesParser, "<tool_call>{oh}</tool_call> x", "<tool_call>{oh}</tool_call> x", []),
    (
        HermesParser,
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        [],
    ),
    (
        HermesParser,
        '<tool_call>{"name": [], "arguments": 4}</tool_call>',
        '<tool_call>{"name": [], "arguments": 4}</tool_call>',
        [],
    ),
    (
        Llama3JsonParser,
        '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}',
        None,
        [("weather", PARIS)],
    ),
    (
        Llama3JsonParser,
        '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}',
        None,
        [("now", {}), ("now", {})],
    ),
    (Llama3JsonParser, '{"answer": 4} and text', '{"answer": 4} and text', []),
    (Llama3JsonParser, "see " + W, "see " + W, []),
    (MistralParser, f"[TOOL_CALLS] [{W}, {N}]", None, [("weather", PARIS), ("now", {})]),
    (
        MistralParser,
        '[TOOL_CALLS]weather[ARGS]{"days": 1}[TOOL_CALLS]now[ARGS]{}',
        None,
        [("weather", {"days": 1}), ("now", {})],
    ),
    (MistralParser, "So: [TOOL_CALLS] nothing", "So: [TOOL_CALLS] nothing", []),
    (GraniteParser, f"<|tool_call|>[{W}]", None, [("weather", PARIS)]),
    (GraniteParser, f"<tool_call>[{N}, {W}]", None, [("now", {}), ("weather", PARIS)]),
    (Phi4Parser, f"<|tool_call|>[{W}]<|/tool_call|>", None, [("weather", PARIS)]),
    (Phi4Parser, f"functools[{W},{N}]", None, [("weather", PARIS), ("now", {})]),
    (
        Qwen3CoderParser,
        "Yes.\n<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "Yes.\n",
        [("weather", {"city": "12", "days": 3})],
    ),
    (
        Qwen3CoderParser,
        "<tool_call><function=now></function></tool_call>",
        None,
        [("now", {})],
    ),
    (Qwen3CoderParser, f"<tool_call>{W}</tool_call>", f"<tool_call>{W}</tool_call>", []),
    (
        PythonicParser,
        '[weather(city="Paris", days=2), now()]',
        None,
        [("weather", PARIS), ("now", {})],
    ),
    (PythonicParser, "[1, 2, 3]", "[1, 2, 3]", []),
    (PythonicParser, '[weather(city=open("x"))]', '[weather(city=open("x"))]', []),
    (PythonicParser, r'[weather(city="\d")]', None, [("weather", {"city": r"\d"})]),
    (PythonicParser, "[" * 5000, "[" * 5000, []),
    (
        GemmaParser,
        "<start_function_call>call:weather{city:<escape>Paris, } x<escape>,days:2,"
        "o:{k:[1,true,<escape>z<escape>]}}<end_function_call>",
        None,
        [("weather", {"city": "Paris, } x", "days": 2, "o": {"k": [1, True, "z"]}})],
    ),
    (
        GemmaParser,
        "<start_function_call>call:weather{a:{{<end_function_call>",
        "<start_function_call>call:weather{a:{{<end_function_call>",
        [],
    ),
    (
        GemmaParser,
        "<start_function_call>call:now{a:" + "[" * 500 + "<end_function_call>",
        "<start_function_call>call:now{a:" + "[" * 500 + "<end_function_call>",
        [],
    ),
]
IDS = [f"{getattr(cls, '__name__', cls)} {text[:30]}" for cls, text, _, _ in CASES]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("parser", "text", "content", "calls"), CASES, ids=IDS)
def test_what_is_found(
    parser: Callable[[], ToolParser],
    text: str,
    content: str | None,
    calls: list[tuple[str, Any]],
    stream: bool,
) -> None:
    assert found(parser(), [text], stream=stream) == (content, calls)
    for place in range(0, len(text) + 1, 1 if len(text) < 500 else 997):
        pieces = [text[:place], text[place:]]
        assert found(parser(), pieces, stream=stream) == (content, calls), place
    assert found(parser(), [*text[:500], text[500:], ""], stream=stream) == (content, calls)


PARSERS: list[Callable[[], ToolParser]] = [
    *(HermesParser, Llama3JsonParser, MistralParser, GraniteParser, Phi4Parser),
    *(Qwen3CoderParser, PythonicParser, GemmaParser),
]
PIECES = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "functools", "<|tool_call|>", W, N, "[ARGS]"),
    *("[", "]", "{", "}", '"', "\\", ",", ";", " ", "\n", "🙂", "now", "(", ")", "<function=now>"),
    *("<parameter=a>", "<start_function_call>", "call:now{", "<end_function_call>", "<escape>"),
]


@settings(deadline=None)
@given(st.data())
def test_any_text_comes_out_whole_however_it_is_cut(data: st.DataObject) -> None:
    """And nothing is an error."""
    parser = data.draw(st.sampled_from(PARSERS))
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=12)))
    request = ParserRequest({"tools": TOOLS}, "hi")

    def told(pieces: list[str]) -> dict[str, Any]:
        choice, parts = ChoiceParser(None, parser(), request), MessageParts()
        for i, piece in enumerate(pieces, 1):
            parts.add(choice.feed(piece, is_last=i == len(pieces)))
        message = parts.message()
        for call in message.get("tool_calls", ()):
            del call["id"]
        return message

    whole = told([text])
    if "tool_calls" not in whole:
        assert whole["content"] == text
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    assert told([text[a:b] for a, b in pairwise([0, *sorted(places), len(text)])]) == whole


@pytest.mark.parametrize("at", range(len("<tool_call>") * 3 + 1))
def test_markers_before_a_call_are_text_wherever_they_are_cut(at: int) -> None:
    text = "<tool_call>" * 3 + W
    choice = ChoiceParser(None, HermesParser(), ParserRequest({"tools": TOOLS}, "hi"))
    parts = MessageParts()
    for piece in (text[:at], text[at:]):
        parts.add(choice.feed(piece, is_last=piece == text[at:]))
    message = parts.message()
    assert message["content"] == "<tool_call>" * 2
    assert len(message["tool_calls"]) == 1


def test_arguments_stream_as_they_come() -> None:
    request = ParserRequest({"tools": TOOLS, "stream": True}, "hi")
    choice = ChoiceParser(None, HermesParser(), request)
    text = f"<tool_call>\n{W}\n</tool_call>"
    deltas = [choice.feed(char, is_last=False) for char in text]
    begun = [delta.calls[0].begun for delta in deltas if 0 in delta.calls]
    assert sum(one is not None for one in begun) == 1
    assert len(begun) > 20


def test_long_texts_are_no_calls() -> None:
    text = "[now(a='" + "x" * LONGEST + "')]"
    assert found(PythonicParser(), [text], stream=False) == (text, [])


@pytest.mark.parametrize(
    ("sign", "family"),
    [
        ("<tool_call>", "hermes"),
        ("<tool_call>\n<function=example>", "qwen3_coder"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|tool_call|>", "granite"),
        ("<|tool|> <|/tool|>", "phi4"),
        ("<|python_tag|>", "llama3_json"),
        ("[func_name1(params)]", "pythonic"),
        ("<start_function_call>", "gemma"),
        ("", "hermes"),
    ],
)
def test_the_family_is_found_in_the_template(sign: str, family: str) -> None:
    assert family_of("{% if tools %}" + sign + "{% endif %}")[0] == family


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [TOOLS[0], TOOLS[1], TOOLS[0]]}, "tools", r"tools\[2\].*tools\[0\]"),
    ({"tools": [{"type": "web_search"}]}, "tools", r"tools\[0\].type: 'web_search'.*: expected"),
    ({"tools": [{"type": "function"}]}, "tools", "expected"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools", "name"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools",
        "JSON schema",
    ),
    ({"tool_choice": "auto"}, "tool_choice", "only with tools"),
    ({"tools": TOOLS, "tool_choice": "must"}, "tool_choice", "expected auto"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "wether"}}},
        "tool_choice",
        "did you mean 'weather'",
    ),
    ({"functions": [{"name": "f"}]}, "functions", "use tools"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=[words for _, _, words in BAD])
def test_bad_tools_are_refused(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        read_tools(fields)
    assert caught.value.param == param
