"""Thoughts apart from answers, however the text is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_di.components.interfaces import ParserRequest, ReasoningParser
from vllm_di.components.reasoning_parser.families import family_of
from vllm_di.components.reasoning_parser.tags import (
    DeepseekR1Parser,
    GraniteReasoningParser,
    Qwen3Parser,
)
from vllm_di.errors import RequestError
from vllm_di.server.parsing import ChoiceParser, MessageParts

OPENED, CLOSED = "<|assistant|>\n<think>\n", "<|assistant|>\n<think>\n\n</think>\n\n"
CASES: list[tuple[Callable[[], ReasoningParser], str, str, str | None, str]] = [
    (Qwen3Parser, "hi", "<think>\nso\nso\n</think>\n\nYes.", "so\nso\n", "Yes."),
    (Qwen3Parser, "hi", "Yes, <think> is a mark.</think>", None, "Yes, <think> is a mark.</think>"),
    (Qwen3Parser, OPENED, "hm </thin\n</think> Yes </think>.", "hm </thin\n", "Yes </think>."),
    (Qwen3Parser, CLOSED, "Yes.", None, "Yes."),
    (Qwen3Parser, OPENED, "never closed </thi", "never closed </thi", ""),
    (Qwen3Parser, "hi", " <thi", None, " <thi"),
    (Qwen3Parser, "hi", "<think></think>x", None, "x"),
    (DeepseekR1Parser, "hi", "so it is </think>Yes.", "so it is ", "Yes."),
    (DeepseekR1Parser, "hi", "<think>so</think>Yes.", "so", "Yes."),
    (DeepseekR1Parser, "hi", "only thoughts", "only thoughts", ""),
    (DeepseekR1Parser, CLOSED, "Yes.", None, "Yes."),
    (
        GraniteReasoningParser,
        "hi",
        "Here is my thought process: 7 * 13.\nHere is my response: No.",
        "7 * 13.\n",
        "No.",
    ),
    (GraniteReasoningParser, "hi", "Here is my answer.", None, "Here is my answer."),
]


def message(parser: ReasoningParser, prompt: str, pieces: list[str]) -> dict[str, Any]:
    choice, parts = ChoiceParser(parser, None, ParserRequest({}, prompt)), MessageParts()
    for i, piece in enumerate(pieces, 1):
        parts.add(choice.feed(piece, is_last=i == len(pieces)))
    return parts.message()


@pytest.mark.parametrize(
    ("parser", "prompt", "text", "thought", "content"), CASES, ids=[case[2] for case in CASES]
)
def test_thought_and_answer(
    parser: Callable[[], ReasoningParser],
    prompt: str,
    text: str,
    thought: str | None,
    content: str,
) -> None:
    pieces = [[text], [*text], [*text, ""]]
    pieces += [[text[:at], text[at:]] for at in range(len(text) + 1)]
    for cut in pieces:
        found = message(parser(), prompt, cut)
        assert (found.get("reasoning_content"), found["content"]) == (thought, content), cut


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{{ '<think>' }}", "qwen3"),
        ("<\uff5cAssistant\uff5c><think>", "deepseek_r1"),
        ("<\uff5cAssistant\uff5c>", "none"),
        ("Write down your thought process after ...", "granite"),
        ("{{ messages }}", "none"),
    ],
)
def test_the_family_is_found_in_the_template(template: str, family: str) -> None:
    assert family_of(template)[0] == family


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"reasoning_effort": "hihg"}, "did you mean 'high'"),
        ({"reasoning_effort": 3}, "expected none"),
    ],
    ids=str,
)
def test_what_it_lacks_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Qwen3Parser().check(fields)
    Qwen3Parser().check({"reasoning_effort": "low", "thinking": {"type": "enabled"}})


@pytest.mark.parametrize(
    ("parser", "prompt", "begins"),
    [
        (Qwen3Parser, "hi", "before"),
        (Qwen3Parser, OPENED, "inside"),
        (Qwen3Parser, CLOSED, "behind"),
        (DeepseekR1Parser, "hi", "inside"),
        (DeepseekR1Parser, CLOSED, "behind"),
        (GraniteReasoningParser, "hi", "before"),
    ],
)
def test_where_the_answer_begins(
    parser: Callable[[], ReasoningParser], prompt: str, begins: str
) -> None:
    marks = parser().marks(ParserRequest({}, prompt))
    assert marks is not None
    assert marks.begins == begins
