"""From the text of a choice to a message in OpenAI's form, through the two parsers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from vllm_di.components.interfaces import (
    ContentDelta,
    ParserEvent,
    ParserRequest,
    ParserState,
    ReasoningDelta,
    ReasoningParser,
    ToolCallBegun,
    ToolParser,
)


def wants_tools(request: Any) -> bool:
    """Whether the answer may contain tool calls. The tool parser runs only then."""
    return bool(request.tools) and request.tool_choice != "none"


class MessageDelta(msgspec.Struct):
    """What one piece of text adds to a message."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, ToolCall] = {}
    """By the index of the call."""

    def fields(self) -> dict[str, Any]:
        """``choices[].delta``, without empty fields."""
        fields: dict[str, Any] = {}
        if self.reasoning:
            fields["reasoning_content"] = self.reasoning
        if self.content:
            fields["content"] = self.content
        if self.calls:
            fields["tool_calls"] = [{"index": i, **c.fields()} for i, c in self.calls.items()]
        return fields


class ToolCall(msgspec.Struct):
    """A tool call, or more arguments of one that began in an earlier delta."""

    begun: ToolCallBegun | None = None
    arguments: list[str] = []
    """Pieces of JSON."""

    def fields(self) -> dict[str, Any]:
        arguments = "".join(self.arguments)
        if self.begun is None:
            return {"function": {"arguments": arguments}}
        function = {"name": self.begun.name, "arguments": arguments}
        return {"id": self.begun.id, "type": "function", "function": function}


class ChoiceParser:
    """Feeds the text of one choice to the reasoning parser, and the content that it finds to the
    tool parser, if there is one."""

    def __init__(
        self,
        reasoning_parser: ReasoningParser | None,
        tool_parser: ToolParser | None,
        request: ParserRequest,
        *,
        parallel: bool = True,
    ) -> None:
        """Without ``parallel`` calls behind the first are left out."""
        self._parallel = parallel
        parsers = (reasoning_parser, tool_parser)
        states = [parser.start(request) for parser in parsers if parser is not None]
        self._first, self._second = [*filter(None, states), None, None][:2]
        self.num_calls = 0

    def feed(self, text: str, *, is_last: bool) -> MessageDelta:
        """Parse the next piece of text. Raises RuntimeError when a parser begins a call twice or
        out of order, or gives arguments of a call that it never began."""
        if self._first is None:
            return MessageDelta(text)
        events = self._first.feed(text) if text else ()
        if is_last:
            events = [*events, *self._first.finish()]
        if self._second is not None:
            events = _through(self._second, events, is_last=is_last)
        if len(events) == 1 and isinstance(events[0], ContentDelta):  # nearly always
            return MessageDelta(events[0].text)
        content, reasoning, calls = [], [], dict[int, ToolCall]()
        for event in events:
            if isinstance(event, ContentDelta):
                content.append(event.text)
            elif isinstance(event, ReasoningDelta):
                reasoning.append(event.text)
            elif event.index > 0 and not self._parallel:
                continue
            elif isinstance(event, ToolCallBegun):
                self._check(event.index == self.num_calls, event)
                self.num_calls += 1
                calls[event.index] = ToolCall(event)
            else:
                self._check(0 <= event.index < self.num_calls, event)
                calls.setdefault(event.index, ToolCall()).arguments.append(event.text)
        return MessageDelta("".join(content), "".join(reasoning), calls)

    def _check(self, is_good: bool, event: ParserEvent) -> None:
        if not is_good:
            raise RuntimeError(f"a parser gave {event} after {self.num_calls} calls had begun")


def _through(
    state: ParserState, events: Sequence[ParserEvent], *, is_last: bool
) -> list[ParserEvent]:
    """Feed the content among ``events`` to a parser; other events pass unchanged."""
    result: list[ParserEvent] = []
    for event in events:
        if not isinstance(event, ContentDelta):
            result.append(event)
        elif event.text:
            result += state.feed(event.text)
    if is_last:
        result += state.finish()
    return result


class MessageParts:
    """Collects the deltas of a whole message."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, ToolCall] = {}

    def add(self, delta: MessageDelta) -> None:
        self._content.append(delta.content)
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        for index, call in delta.calls.items():
            self._calls.setdefault(index, ToolCall(call.begun)).arguments += call.arguments

    def message(self) -> dict[str, Any]:
        """``choices[].message``. The content is null only beside tool calls."""
        content = "".join(self._content)
        shown = None if self._calls and not content else content
        message: dict[str, Any] = {"role": "assistant", "content": shown, "refusal": None}
        if reasoning := "".join(self._reasoning):
            message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = [call.fields() for call in self._calls.values()]
        return message
