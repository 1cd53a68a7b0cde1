"""Tool calls that a model writes in a form of its own: each is told when it is whole."""

from __future__ import annotations

import ast
import json
import re
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vllm_di.components.interfaces import ParserEvent, ParserRequest, ParserState, ToolParser
from vllm_di.components.tool_parser.asked import Tool, read_tools
from vllm_di.components.tool_parser.json_calls import Held

Call = tuple[str, dict[str, Any]]
"""Name and arguments."""
_FUNCTION, _PARAMETER = "<function=", "<parameter="
LONGEST = 65_536
"""Characters of calls that are read; what is longer is no call."""
DEEPEST = 32
"""Nesting of arguments; deeper ones are no call."""


class TextCallParser(ToolParser):
    """Calls between two markers, or, without markers, as a whole answer."""

    needs_special_tokens = True
    opening: ClassVar[str] = ""
    closing: ClassVar[str] = ""

    def check(self, request: Mapping[str, Any]) -> None:
        read_tools(request)

    def start(self, request: ParserRequest) -> ParserState:
        return TextCalls(self, read_tools(request.fields).tools)

    @abstractmethod
    def read(self, text: str, tools: Mapping[str, Tool]) -> list[Call]:
        """The calls in what stands between the markers. Raises ValueError for what is none."""


class TextCalls(Held):
    """One choice."""

    def __init__(self, parser: TextCallParser, tools: Sequence[Tool]) -> None:
        super().__init__()
        self._parser, self._tools = parser, {tool.name: tool for tool in tools}

    def _run(self) -> Iterator[ParserEvent | None]:
        opening, closing = self._parser.opening, self._parser.closing
        if not opening:
            yield from self._whole_answer()
            return
        while True:
            yield from self._to_marker((opening,))
            if not self._text.startswith(opening):
                return
            while (end := self._text.find(closing, len(opening))) < 0 and not self._ended:
                yield None
            inside = self._text[len(opening) : end if end >= 0 else len(self._text)]
            length = end + len(closing) if end >= 0 else len(self._text)
            yield from self._read(inside, length)

    def _whole_answer(self) -> Iterator[ParserEvent | None]:
        """Held until its end, where it may be a list of calls."""
        while not self._ended and self._text.lstrip()[:1] in ("", "["):
            yield None
        if self._text.lstrip()[:1] == "[":
            yield from self._read(self._text, len(self._text))
        while True:
            yield from self._content(len(self._text))
            yield None

    def _read(self, inside: str, length: int) -> Iterator[ParserEvent]:
        try:
            calls = self._parser.read(inside, self._tools) if len(inside) <= LONGEST else []
            texts = [json.dumps(arguments, ensure_ascii=False) for _, arguments in calls]
        except (ValueError, TypeError, RecursionError, MemoryError):
            calls = []
        if not calls or any(name not in self._tools for name, _ in calls):
            yield from self._content(length)
            return
        self._take(length)
        for (name, _), text in zip(calls, texts, strict=True):
            yield from self._whole(name, text)


class Qwen3CoderParser(TextCallParser):
    """``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``: a
    value is text where the tool's schema says so, else JSON."""

    opening, closing = "<tool_call>", "</tool_call>"

    def read(self, text: str, tools: Mapping[str, Tool]) -> list[Call]:
        head, _, body = text.strip().removeprefix(_FUNCTION).partition(">")
        if not text.strip().startswith(_FUNCTION) or "\n" in head:
            raise ValueError("no <function=...>")
        name, types = head.strip(), _types(tools.get(head.strip()))
        body = body.strip().removesuffix("</function>")
        arguments: dict[str, Any] = {}
        while body := body.strip():
            key, closed, rest = body.removeprefix(_PARAMETER).partition(">")
            if not body.startswith(_PARAMETER) or not closed:
                raise ValueError("no <parameter=...>")
            ends = [at for tag in ("</parameter>", _PARAMETER) if (at := rest.find(tag)) >= 0]
            value = rest[: min(ends, default=len(rest))]
            body = rest[len(value) :].removeprefix("</parameter>")
            value = value.removeprefix("\n").removesuffix("\n")
            arguments[key] = _typed(value, types.get(key))
        return [(name, arguments)]


class PythonicParser(TextCallParser):
    """The whole answer is a list of Python calls with literal keywords, ``[f(a=1), g()]``: Llama 4,
    ToolACE."""

    def read(self, text: str, tools: Mapping[str, Tool]) -> list[Call]:
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
                tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ValueError(str(error)) from None
        if not isinstance(tree, ast.List) or not tree.elts:
            raise ValueError("no list of calls")
        return [self._call(node) for node in tree.elts]

    def _call(self, node: ast.expr) -> Call:
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("no call with keywords")
        name = ast.unparse(node.func)
        return name, {_keyword(k): ast.literal_eval(k.value) for k in node.keywords}


class GemmaParser(TextCallParser):
    """``<start_function_call>call:NAME{key:<escape>text<escape>,n:3}<end_function_call>``:
    FunctionGemma."""

    opening, closing = "<start_function_call>", "<end_function_call>"

    def read(self, text: str, tools: Mapping[str, Tool]) -> list[Call]:
        found = re.match(r"\s*call:([\w.-]+)\s*(?=\{)", text)
        if found is None:
            raise ValueError("no call:NAME{")
        value, end = _gemma_value(text, found.end(), 0)
        if not isinstance(value, dict) or text[end:].strip():
            raise ValueError("no object of arguments")
        return [(found[1], value)]


def _gemma_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """-> the value at ``at``, and where it ends."""
    quote = "<escape>"
    if depth > DEEPEST:
        raise ValueError("nested too deep")
    if text.startswith(quote, at):
        end = text.index(quote, at + len(quote))
        return text[at + len(quote) : end], end + len(quote)
    opening = text[at : at + 1]
    if opening not in ("{", "["):
        found = re.compile(r"[^,\]}]*").match(text, at)
        assert found is not None
        return _typed(found[0].strip(), None), found.end()
    closing = "}" if opening == "{" else "]"
    items: list[Any] = []
    at += 1
    while True:
        while text[at : at + 1].isspace():
            at += 1
        if text[at : at + 1] == closing:
            return (dict(items) if opening == "{" else items), at + 1
        key = None
        if opening == "{":
            found = re.compile(r"(?:<escape>)?([^:<]+)(?:<escape>)?:\s*").match(text, at)
            if found is None:
                raise ValueError("no key")
            key, at = found[1].strip(), found.end()
        value, at = _gemma_value(text, at, depth + 1)
        items.append(value if key is None else (key, value))
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != closing:
            raise ValueError("not closed")


def _keyword(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("no **")
    return keyword.arg


def _types(tool: Tool | None) -> dict[str, Any]:
    """Parameter to the ``type`` of its schema."""
    properties = tool.parameters.get("properties") if tool else None
    if not isinstance(properties, dict):
        return {}
    return {k: v.get("type") for k, v in properties.items() if isinstance(v, dict)}


def _typed(text: str, kind: Any) -> Any:
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
