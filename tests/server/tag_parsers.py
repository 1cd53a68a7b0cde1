"""Parsers for tests: ``<think>...</think>`` and ``<tool_call>{json}</tool_call>``."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_di.components.interfaces import (
    ContentDelta,
    ParserEvent,
    ParserRequest,
    ParserState,
    ReasoningDelta,
    ReasoningParser,
    ToolCallArguments,
    ToolCallBegun,
    ToolParser,
)

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
ARGUMENTS = '"arguments": {'


def split(text: str, tag: str) -> tuple[str, str, bool]:
    """-> what comes before the tag, what comes after it or may be its beginning, and whether it
    was found."""
    before, found, after = text.partition(tag)
    if found:
        return before, after, True
    held = next(i for i in range(len(tag) - 1, -1, -1) if text.endswith(tag[:i]))
    return text[: len(text) - held], text[len(text) - held :], False


class ThinkParser(ReasoningParser):
    """All between the tags is reasoning, also where the prompt opened it."""

    def check(self, request: Mapping[str, Any]) -> None:
        pass

    def start(self, request: ParserRequest) -> ParserState:
        return _Thinking(request.prompt.endswith(THINK))


class _Thinking(ParserState):
    def __init__(self, is_inside: bool) -> None:
        self._held, self._is_inside = "", is_inside

    def feed(self, delta: str) -> list[ParserEvent]:
        events: list[ParserEvent] = []
        self._held, found = self._held + delta, True
        while found:
            tag = END_THINK if self._is_inside else THINK
            text, self._held, found = split(self._held, tag)
            events += self._told(text)
            self._is_inside ^= found
        return events

    def finish(self) -> list[ParserEvent]:
        return self._told(self._held)

    def _told(self, text: str) -> list[ParserEvent]:
        if not text:
            return []
        return [ReasoningDelta(text) if self._is_inside else ContentDelta(text)]


class TagToolParser(ToolParser):
    """Holds a call back until it is whole and valid or, with ``streams``, passes its arguments on
    as they come. Remembers what it was asked."""

    needs_special_tokens = True

    def __init__(self, *, streams: bool = False) -> None:
        self.streams = streams
        self.requests: list[ParserRequest] = []

    def check(self, request: Mapping[str, Any]) -> None:
        pass

    def start(self, request: ParserRequest) -> ParserState:
        self.requests.append(request)
        return _StreamedCalls() if self.streams else _WholeCalls()


class _Calls(ParserState):
    """Runs a generator over what is held; it yields None where it needs more text."""

    def __init__(self) -> None:
        self._held = ""
        self._num_calls = 0
        self._steps = self._run()

    def feed(self, delta: str) -> list[ParserEvent]:
        self._held += delta
        events: list[ParserEvent] = []
        for event in self._steps:
            if event is None:
                break
            events.append(event)
        return events

    def finish(self) -> Sequence[ParserEvent]:
        return [ContentDelta(self._held)] if self._held else []

    def _run(self) -> Iterator[ParserEvent | None]:
        while True:
            text, rest, found = split(self._held, CALL)
            if text:
                yield ContentDelta(text)
            self._held = CALL + rest if found else rest
            if found:
                yield from self._call()
            else:
                yield None

    def _call(self) -> Iterator[ParserEvent | None]:
        raise NotImplementedError

    def _begun(self, name: str) -> ToolCallBegun:
        self._num_calls += 1
        return ToolCallBegun(self._num_calls - 1, f"call_{uuid.uuid4().hex}", name)

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken


class _WholeCalls(_Calls):
    def _call(self) -> Iterator[ParserEvent | None]:
        while (end := self._held.find(END_CALL)) < 0:
            yield None
        text = self._take(end + len(END_CALL))
        try:
            call = json.loads(text[len(CALL) : end])
            name, arguments = call["name"], json.dumps(call["arguments"])
        except (ValueError, TypeError, KeyError):
            yield ContentDelta(text)
            return
        yield (begun := self._begun(name))
        yield ToolCallArguments(begun.index, arguments)


class _StreamedCalls(_Calls):
    def _call(self) -> Iterator[ParserEvent | None]:
        while ARGUMENTS not in self._held and END_CALL not in self._held:
            yield None
        start = self._held.find(ARGUMENTS)
        head = re.fullmatch(CALL + r'\s*{"name": "(\w+)", ', self._held[: max(start, 0)])
        if head is None:
            while (end := self._held.find(END_CALL)) < 0:
                yield None
            yield ContentDelta(self._take(end + len(END_CALL)))
            return
        self._take(start + len(ARGUMENTS) - 1)
        yield (begun := self._begun(head[1]))
        depth, is_string, is_escaped = 0, False, False
        while True:
            while not self._held:
                yield None
            char = self._take(1)
            yield ToolCallArguments(begun.index, char)
            is_string ^= char == '"' and not is_escaped
            is_escaped = char == "\\" and not is_escaped
            depth += 0 if is_string else {"{": 1, "}": -1}.get(char, 0)
            if depth == 0:
                break
        while (end := self._held.find(END_CALL)) < 0:
            yield None
        rest = self._take(end + len(END_CALL))
        if rest[:end].strip() != "}":  # what was told stays; the rest comes back
            yield ContentDelta(rest)
