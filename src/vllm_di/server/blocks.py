"""A message as blocks that follow one another, for APIs that tell it so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from vllm_di.components.interfaces import ToolCallBegun
from vllm_di.server.parsing import MessageDelta, ToolCall

Text = Literal["reasoning", "text"]


class Blocks(ABC):
    """Reasoning, text and tool calls in the order in which the model gave them; the last block may
    be open. Text of spaces alone around calls is no block. Methods give the events of what they
    did."""

    def __init__(self) -> None:
        self._open: Text | int | None = None
        """What the last block is, or the index of its call; None when it is closed."""
        self._pieces: list[str] = []
        """Of the open block."""
        self._spaces = ""
        """Text that becomes part of a block once other text follows it."""

    def add(self, delta: MessageDelta) -> list[bytes]:
        """Take in what a piece of text adds. Raises RuntimeError when a parser gives arguments of a
        call that has ended."""
        events: list[bytes] = []
        if delta.reasoning:
            events += self._text("reasoning", delta.reasoning)
        if delta.content:
            text = self._spaces + delta.content
            if self._open == "text" or not text.isspace():
                self._spaces = ""
                events += self._text("text", text)
            else:
                self._spaces = text
        for index, call in delta.calls.items():
            events += self._call(index, call)
        return events

    def close(self) -> list[bytes]:
        """End the open block."""
        kind, self._open = self._open, None
        if kind is None:
            return []
        text, self._pieces = "".join(self._pieces), []
        return self._end(kind, text)

    def _text(self, kind: Text, text: str) -> list[bytes]:
        events = [] if self._open == kind else self._next(kind, None)
        self._pieces.append(text)
        return [*events, self._more(kind, text)]

    def _call(self, index: int, call: ToolCall) -> list[bytes]:
        events: list[bytes] = []
        if call.begun is not None:
            self._spaces = ""
            events = self._next(index, call.begun)
        if arguments := "".join(call.arguments):
            if self._open != index:
                raise RuntimeError(f"a parser gave arguments of call {index} after its end")
            self._pieces.append(arguments)
            events.append(self._more(index, arguments))
        return events

    def _next(self, kind: Text | int, call: ToolCallBegun | None) -> list[bytes]:
        events = self.close()
        self._open = kind
        return [*events, *self._begin(kind, call)]

    @abstractmethod
    def _begin(self, kind: Text | int, call: ToolCallBegun | None) -> list[bytes]:
        """A block begins; ``call`` where ``kind`` is the index of one."""

    @abstractmethod
    def _more(self, kind: Text | int, text: str) -> bytes:
        """The open block grows."""

    @abstractmethod
    def _end(self, kind: Text | int, text: str) -> list[bytes]:
        """The last block has ended with this text, or arguments."""
