"""Calls that must come: every answer of any model is one, with arguments that fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from vllm_di import LLM, SamplingParams
from vllm_di.components.interfaces import ParserRequest
from vllm_di.components.tool_parser.asked import read_tools
from vllm_di.components.tool_parser.json_calls import HermesParser
from vllm_di.errors import RequestError
from vllm_di.server.parsing import ChoiceParser, MessageParts
from vllm_di.server.required import RequiredCalls

TINY = ["platform=cpu", "model.dtype=float32"]
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "pattern": "^[A-Z][a-z]{0,8}$"}},
}
TREE = {
    "type": "object",
    "properties": {"left": {"type": "null"}, "word": {"type": "string", "maxLength": 6}},
    "required": ["word"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "spell", "parameters": TREE}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}


def required(choice: Any, tools: list[dict[str, Any]] | None = None) -> RequiredCalls:
    fields = {"tools": tools or TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    return RequiredCalls(read_tools(fields))


def fits(name: str, arguments: Mapping[str, Any]) -> bool:
    if name == "weather":
        city = arguments["city"]
        return set(arguments) == {"city", "days"} and city[0].isupper() and len(city) < 10
    if name == "spell":
        return arguments.keys() <= {"left", "word"} and len(arguments["word"]) <= 6
    return name == "now" and not arguments


def called(parser: RequiredCalls, text: str) -> list[tuple[str, dict[str, Any]]]:
    choice = ChoiceParser(None, parser, ParserRequest({"tools": TOOLS}, ""))
    parts = MessageParts()
    for char in text:
        parts.add(choice.feed(char, is_last=False))
    parts.add(choice.feed("", is_last=True))
    message = parts.message()
    assert message["content"] is None
    functions = [call["function"] for call in message["tool_calls"]]
    return [(one["name"], json.loads(one["arguments"])) for one in functions]


def answers(llm: LLM, parser: RequiredCalls, num: int) -> list[Any]:
    params = SamplingParams(
        temperature=1.0, max_tokens=120, structured_output={"tools": parser.constraint()}
    )
    done = llm.generate([f"Question {i}: " for i in range(num)], params)
    return [one.outputs[0] for one in done]


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_every_answer_of_an_untrained_model_is_a_call(choice: Any) -> None:
    parser = required(choice)
    with LLM("tiny", overrides=TINY) as llm:
        for one in answers(llm, parser, 24):
            assert one.finish_reason == "stop"
            ((name, arguments),) = called(parser, one.text)
            assert fits(name, arguments)
            assert choice == "required" or name == "weather"


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_two_hundred_answers_of_a_real_model_are_calls(choice: Any) -> None:
    parser = required(choice)
    with LLM(overrides=["platform=cpu"]) as llm:
        found = answers(llm, parser, 200)
    assert sum(one.finish_reason == "length" for one in found) == 0
    assert all(fits(*called(parser, one.text)[0]) for one in found)


@pytest.mark.parametrize("choice", ["required", {"function": {"name": "odd"}}], ids=str)
def test_a_schema_that_cannot_be_honoured_is_refused_with_its_place(choice: Any) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools = [TOOLS[2], {"type": "function", "function": {"name": "odd", "parameters": odd}}]
    parser = required(choice, tools)
    with LLM("tiny", overrides=TINY) as llm:
        with pytest.raises(RequestError, match="uniqueItems") as caught:
            answers(llm, parser, 1)
        assert caught.value.param == "tools"
        assert "[1].function.parameters" in caught.value.message
        assert "/properties/a" in caught.value.message


def allowed(mode: Any, *names: Any) -> dict[str, Any]:
    listed = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": listed}}


def test_calls_of_allowed_tools_alone() -> None:
    parser = required(allowed("required", "now", "spell"))
    seen = set()
    with LLM("tiny", overrides=TINY) as llm:
        for one in answers(llm, parser, 24):
            assert one.finish_reason == "stop"
            ((name, arguments),) = called(parser, one.text)
            assert fits(name, arguments)
            seen.add(name)
    assert seen == {"now", "spell"}


def test_of_the_allowed_tools_one_may_be_called() -> None:
    """Another one, that a model calls all the same, comes back as text."""
    fields = {"tools": TOOLS, "tool_choice": allowed("auto", "spell")}
    asked = read_tools(fields)
    assert (asked.choice, [tool.name for tool in asked.tools]) == ("auto", ["spell"])
    for name, is_call in (("spell", True), ("weather", False)):
        text = f'<tool_call>{{"name": "{name}", "arguments": {{"word": "a"}}}}</tool_call>'
        choice = ChoiceParser(None, HermesParser(), ParserRequest(fields, ""))
        parts = MessageParts()
        parts.add(choice.feed(text, is_last=True))
        message = parts.message()
        assert ("tool_calls" in message) == is_call
        assert is_call or message["content"] == text


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (allowed("none", "now"), "expected .*mode"),
        (allowed(None, "now"), "expected .*mode"),
        (allowed("auto"), "a tool or more"),
        (allowed("auto", "spel"), r"tools\[0\]: no tool is called 'spel'; did you mean 'spell'"),
        (allowed("auto", "now", 7), r"tools\[1\]: expected"),
        ({"type": "allowed_tools"}, "expected .*mode"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [3]}}, "expected"),
        ({"type": "custom", "custom": {"name": "now"}}, "expected auto, none, required"),
    ],
    ids=str,
)
def test_choices_that_fit_no_tool(choice: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        read_tools({"tools": TOOLS, "tool_choice": choice})
    assert caught.value.param == "tool_choice"


def test_tools_of_another_type_are_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"tools\[0\]\.type: 'custom' is not") as caught:
        read_tools({"tools": [{"type": "custom", "custom": {"name": "now"}}]})
    assert caught.value.param == "tools"


def test_several_calls_where_they_may_come() -> None:
    parser = RequiredCalls(read_tools({"tools": TOOLS, "tool_choice": "required"}))
    text = '[{"name": "now", "parameters": {}}, {"name": "spell", "parameters": {"word": "]}"}}]'
    assert called(parser, text) == [("now", {}), ("spell", {"word": "]}"})]
