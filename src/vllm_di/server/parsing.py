"""From a choice's text to a message in OpenAI's form, by way of the two parsers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def wants_tools(request: Any) -> bool:
    """Whether the answer may have tool calls, so that the tool parser is asked."""
    return bool(request.tools) and request.tool_choice != "none"


class ChoiceParser:
    """Feeds one choice's text to the reasoning parser, and what that leaves as content to the tool
    parser, if there is one."""

    def __init__(
        self,
        reasoning_parser: ReasoningParser,
        tool_parser: ToolParser | None,
        request: ParserRequest,
    ) -> None:
        self._reasoning = reasoning_parser.start(request)
        self._tools = None if tool_parser is None else tool_parser.start(request)
        self.num_calls = 0

    def feed(self, text: str, *, is_last: bool) -> list[ParserEvent]:
        """The events of the next piece of text. Raises RuntimeError for a call that a parser told
        twice, out of order or not at all."""
        events = [*self._reasoning.feed(text)] if text else []
        if is_last:
            events += self._reasoning.finish()
        if self._tools is not None:
            events = [out for event in events for out in self._through(self._tools, event)]
            if is_last:
                events += self._tools.finish()
        for event in events:
            if isinstance(event, ToolCallBegun):
                self._check(event.index == self.num_calls, event)
                self.num_calls += 1
            elif isinstance(event, ToolCallArguments):
                self._check(0 <= event.index < self.num_calls, event)
        return events

    def _through(self, tools: ParserState, event: ParserEvent) -> Sequence[ParserEvent]:
        if not isinstance(event, ContentDelta):
            return (event,)
        return tools.feed(event.text) if event.text else ()

    def _check(self, is_good: bool, event: ParserEvent) -> None:
        if not is_good:
            raise RuntimeError(f"a parser gave {event} after {self.num_calls} calls had begun")


class MessageParts:
    """Joins events: those of one update to a delta, those of a whole text to a message."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, _Call] = {}

    def add(self, events: Iterable[ParserEvent]) -> None:
        for event in events:
            if isinstance(event, ContentDelta):
                self._content.append(event.text)
            elif isinstance(event, ReasoningDelta):
                self._reasoning.append(event.text)
            elif isinstance(event, ToolCallBegun):
                self._calls[event.index] = _Call(event)
            else:
                self._calls.setdefault(event.index, _Call()).arguments.append(event.text)

    def delta(self) -> dict[str, Any]:
        """``choices[].delta``, without what there is nothing of."""
        delta: dict[str, Any] = {}
        if reasoning := "".join(self._reasoning):
            delta["reasoning_content"] = reasoning
        if content := "".join(self._content):
            delta["content"] = content
        if self._calls:
            calls = self._calls.items()
            delta["tool_calls"] = [{"index": i, **call.fields()} for i, call in calls]
        return delta

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


class _Call:
    """A tool call, or the next piece of one that has been told."""

    def __init__(self, begun: ToolCallBegun | None = None) -> None:
        self._begun = begun
        self.arguments: list[str] = []

    def fields(self) -> dict[str, Any]:
        arguments = "".join(self.arguments)
        if self._begun is None:
            return {"function": {"arguments": arguments}}
        function = {"name": self._begun.name, "arguments": arguments}
        return {"id": self._begun.id, "type": "function", "function": function}
