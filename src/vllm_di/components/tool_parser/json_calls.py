"""Tool calls that a model writes as JSON objects with a name and arguments. The arguments are told
as they come."""

from __future__ import annotations

import json
import re
import uuid
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vllm_di.components.interfaces import (
    ContentDelta,
    ParserEvent,
    ParserRequest,
    ParserState,
    ToolCallArguments,
    ToolCallBegun,
    ToolParser,
)
from vllm_di.components.tool_parser.asked import read_tools

_KEYS = ("arguments", "parameters")
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_BARE_HEAD = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*(?=\{)")
"""Mistral's later form: ``name[ARGS]{...}``."""


class JsonCallParser(ToolParser):
    """Calls behind a marker, in a list or one by one."""

    markers: ClassVar[tuple[str, ...]] = ()
    """Each begins a call, or a list of them. Empty: a call is a whole answer."""
    closing: ClassVar[str] = ""
    """Ends it; may be missing at the end of an answer."""
    ignored: ClassVar[str] = ""
    """A marker that may stand before a whole answer."""
    separator: ClassVar[str] = ""
    """Between calls outside a list."""

    def check(self, request: Mapping[str, Any]) -> None:
        read_tools(request)

    def start(self, request: ParserRequest) -> ParserState:
        names = [tool.name for tool in read_tools(request.fields).tools]
        return JsonCalls(type(self), names, streams=bool(request.fields.get("stream")))


class HermesParser(JsonCallParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes 2 Pro, Qwen 2.5 and 3,
    SmolLM3, Granite 4."""

    needs_special_tokens = True
    markers, closing = ("<tool_call>",), "</tool_call>"


class Llama3JsonParser(JsonCallParser):
    """The whole answer is ``{"name": ..., "parameters": {...}}``, several with ``;`` between them:
    Llama 3.1 and later."""

    needs_special_tokens = True
    ignored, separator = "<|python_tag|>", ";"


class MistralParser(JsonCallParser):
    """``[TOOL_CALLS] [{"name": ..., "arguments": {...}}]``, or ``[TOOL_CALLS]name[ARGS]{...}``."""

    needs_special_tokens = True
    markers = ("[TOOL_CALLS]",)


class GraniteParser(JsonCallParser):
    """``<|tool_call|>[{"name": ..., "arguments": {...}}]``: Granite 3."""

    needs_special_tokens = True
    markers, closing = ("<|tool_call|>", "<tool_call>"), "</tool_call>"


class Phi4Parser(JsonCallParser):
    """``<|tool_call|>[...]<|/tool_call|>`` or ``functools[...]``: Phi-4-mini."""

    needs_special_tokens = True
    markers, closing = ("<|tool_call|>", "functools"), "<|/tool_call|>"


class Scanner:
    """Finds the end of a JSON value that begins with a bracket, however it is cut."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._escaped = depth, False, False

    def end(self, text: str, start: int = 0) -> int:
        """One past the bracket in ``text`` that closes the value, -1 where it goes on."""
        for at in range(start, len(text)):
            char = text[at]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return -1


class Held(ParserState):
    """Text on its way through a generator, which yields None where it needs more."""

    def __init__(self) -> None:
        self._text, self._ended, self._num_calls = "", False, 0
        self._steps = self._run()

    def feed(self, delta: str) -> Sequence[ParserEvent]:
        self._text += delta
        return self._pumped()

    def finish(self) -> Sequence[ParserEvent]:
        self._ended = True
        events = self._pumped()
        if self._text:
            events.append(ContentDelta(self._text))
        return events

    def _pumped(self) -> list[ParserEvent]:
        events: list[ParserEvent] = []
        for event in self._steps:
            if event is None:
                break
            events.append(event)
        return events

    @abstractmethod
    def _run(self) -> Iterator[ParserEvent | None]:
        """The events, in order."""

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _content(self, length: int) -> Iterator[ParserEvent]:
        if text := self._take(length):
            yield ContentDelta(text)

    def _begun(self, name: str) -> ToolCallBegun:
        self._num_calls += 1
        return ToolCallBegun(self._num_calls - 1, f"call_{uuid.uuid4().hex}", name)

    def _whole(self, name: str, arguments: str) -> Iterator[ParserEvent]:
        yield (begun := self._begun(name))
        yield ToolCallArguments(begun.index, arguments)

    def _to_marker(self, markers: Sequence[str]) -> Iterator[ParserEvent | None]:
        """Tell the text before the first marker as content, up to where the marker begins. Returns
        with the marker at the beginning of what is held, or at the end of the text. White space
        behind a call is dropped."""
        blank = self._num_calls > 0
        while True:
            if blank:
                self._take(_blanks(self._text, 0))
                blank = not self._text
            found = [at for marker in markers if (at := self._text.find(marker)) >= 0]
            if found:
                yield from self._content(min(found))
                return
            if self._ended:
                return
            kept = max(_overlap(self._text, marker) for marker in markers)
            yield from self._content(len(self._text) - kept)
            yield None


def _overlap(text: str, marker: str) -> int:
    """Characters at the end of a text that may be the beginning of a marker."""
    return next(n for n in range(len(marker) - 1, -1, -1) if text.endswith(marker[:n]))


class JsonCalls(Held):
    """One choice. ``streams``: the arguments are told as they come, so that a call that turns out
    malformed there has begun; else a call is told when it is whole and good JSON."""

    def __init__(
        self, style: type[JsonCallParser], names: Collection[str], *, streams: bool
    ) -> None:
        super().__init__()
        self._style, self._names, self._streams = style, frozenset(names), streams

    def _run(self) -> Iterator[ParserEvent | None]:
        style = self._style
        if not style.markers:
            yield from self._whole_answer()
            return
        while True:
            yield from self._to_marker(style.markers)
            marker = next((m for m in style.markers if self._text.startswith(m)), "")
            if not marker:
                return
            yield from self._calls(len(marker))

    def _whole_answer(self) -> Iterator[ParserEvent | None]:
        ignored = self._style.ignored
        while (text := self._text.lstrip()) == "" or (
            ignored.startswith(text) and text != ignored and not self._ended
        ):
            if self._ended:
                return
            yield None
        marker = len(self._text) - len(text)
        marker += len(ignored) if text.startswith(ignored) else 0  # "" is at each beginning
        if text[:1] in ("{", "[") or (ignored and text.startswith(ignored)):
            yield from self._calls(marker)
        while True:
            yield from self._content(len(self._text))
            yield None

    def _calls(self, start: int) -> Iterator[ParserEvent | None]:
        """What stands behind a marker of ``start`` characters, which are still held."""
        yield from self._until_char(start)
        at = start + _blanks(self._text, start)
        listed = self._text[at : at + 1] == "["
        at += listed
        while True:
            before = self._num_calls
            yield from self._call(at)
            if self._num_calls == before:  # no call: it is text, and so is what follows
                yield from self._content(at)
                return
            yield from self._until_char(0)
            at = _blanks(self._text, 0)
            char = self._text[at : at + 1]
            if char and char == ("," if listed else self._style.separator):
                at += 1
                continue
            break
        if listed and char == "]":
            self._take(at + 1)
        closing = self._style.closing
        if not closing:
            return
        yield from self._until_char(0)
        while True:  # white space and the closing marker, as far as they are there
            text = self._text.lstrip()
            if text.startswith(closing):
                self._take(len(self._text) - len(text) + len(closing))
            if self._ended or not closing.startswith(text):
                return
            yield None

    def _call(self, at: int) -> Iterator[ParserEvent | None]:
        """One call from ``at`` on. Tells nothing, and takes nothing, where there is none."""
        scanner, scanned = Scanner(), at
        while True:
            head = _HEAD.match(self._text, at) or (
                _BARE_HEAD.match(self._text, at) if "[TOOL_CALLS]" in self._style.markers else None
            )
            if head is not None and self._streams:
                if (name := self._name(head)) is not None:
                    yield from self._streamed(name, head)
                return
            bare = head is not None and head.re is _BARE_HEAD
            if bare and head is not None and scanned < head.end():
                scanned = head.end()
            blanks = _blanks(self._text, at)
            first = self._text[at + blanks : at + blanks + 1]
            if (
                first
                and first != "{"
                and "[ARGS]" not in self._text[at:]
                and not self._may_be_bare(at)
            ):
                return
            if first == "{" or bare:
                end = scanner.end(self._text, scanned)
                scanned = len(self._text)
                if end > 0:
                    yield from self._parsed(at, end, head)
                    return
            if self._ended:
                return
            yield None

    def _may_be_bare(self, at: int) -> bool:
        if "[TOOL_CALLS]" not in self._style.markers:
            return False
        return re.fullmatch(r"\s*[\w.-]+(\[[\w\[\]]*)?", self._text[at:]) is not None

    def _name(self, head: re.Match[str]) -> str | None:
        try:
            name = json.loads(head[1]) if head.re is _HEAD else head[1]
        except ValueError:
            return None
        return name if name in self._names else None

    def _streamed(self, name: str, head: re.Match[str]) -> Iterator[ParserEvent | None]:
        yield (begun := self._begun(name))
        self._take(head.end())
        scanner = Scanner()
        while True:
            end = scanner.end(self._text)
            if text := self._take(end if end > 0 else len(self._text)):
                yield ToolCallArguments(begun.index, text)
            if end > 0:
                break
            if self._ended:
                return
            yield None
        if head.re is _BARE_HEAD:
            return
        outer = Scanner(depth=1)  # up to the end of the object: further keys tell nothing
        while (end := outer.end(self._text)) < 0:
            self._take(len(self._text))
            if self._ended:
                return
            yield None
        self._take(end)

    def _parsed(self, at: int, end: int, head: re.Match[str] | None) -> Iterator[ParserEvent]:
        """A call that is there as a whole."""
        try:
            if head is not None and head.re is _BARE_HEAD:
                call = {"name": head[1], "arguments": json.loads(self._text[head.end() : end])}
            else:
                call = json.loads(self._text[at:end])
            name = call["name"]
            arguments: Any = next((call[key] for key in _KEYS if call.get(key) is not None), {})
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
        except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
            return
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return
        text = json.dumps(arguments, ensure_ascii=False)
        if head is not None:  # as the model wrote them, as a stream tells them
            own = self._text[head.end() : end]
            text = own[: Scanner().end(own)]
        self._take(end)
        yield from self._whole(name, text)

    def _until_char(self, start: int) -> Iterator[None]:
        while _blanks(self._text, start) == len(self._text) - start and not self._ended:
            yield None


def _blanks(text: str, start: int) -> int:
    rest = text[start:]
    return len(rest) - len(rest.lstrip())
