"""Reasoning between two marks at the beginning of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from vllm_di.components.interfaces import (
    ContentDelta,
    ParserEvent,
    ParserRequest,
    ParserState,
    ReasoningDelta,
    ReasoningParser,
    ThoughtMarks,
)
from vllm_di.errors import RequestError, nearest

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""What clients send as ``reasoning_effort``. A template reads it, or does not."""
Phase = Literal["before", "inside", "behind"]


class TagReasoningParser(ReasoningParser):
    """Reasoning begins with the answer, or in the prompt. All behind the closing mark is content,
    as is an answer that begins otherwise."""

    needs_special_tokens = True
    opening: ClassVar[tuple[str, ...]] = ("<think>",)
    closing: ClassVar[tuple[str, ...]] = ("</think>",)
    always: ClassVar[bool] = False
    """Whether an answer is reasoning from its beginning, where the prompt has not closed it."""

    def check(self, request: Mapping[str, Any]) -> None:
        if request.get("reasoning") is not None:
            raise RequestError(
                "reasoning is not supported: its fields here are reasoning_effort and "
                "thinking_token_budget",
                param="reasoning",
                code="unsupported_parameter",
            )
        effort = request.get("reasoning_effort")
        if effort is not None and effort not in EFFORTS:
            raise RequestError(
                f"reasoning_effort: expected {', '.join(EFFORTS)}, got {str(effort)[:50]!r}"
                f"{nearest(str(effort)[:50], EFFORTS)}",
                param="reasoning_effort",
            )

    def start(self, request: ParserRequest) -> ParserState:
        is_inside = self.marks(request).begins == "inside"
        return _Marked(self.opening, self.closing, is_inside=is_inside)

    def marks(self, request: ParserRequest) -> ThoughtMarks:
        prompt = request.prompt.rstrip()
        begins: Literal["inside", "before", "behind"] = "inside" if self.always else "before"
        if prompt.endswith(self.opening):
            begins = "inside"
        elif prompt.endswith(self.closing):
            begins = "behind"
        return ThoughtMarks(self.opening, self.closing, begins)


class Qwen3Parser(TagReasoningParser):
    """``<think>...</think>``, where the answer or the prompt opens it: Qwen3, SmolLM3, and others
    that may think."""


class DeepseekR1Parser(TagReasoningParser):
    """As ``qwen3``, and an answer without an opening mark is reasoning too: DeepSeek-R1."""

    always = True


class GraniteReasoningParser(TagReasoningParser):
    """``Here is my thought process: ... Here is my response: ...``: Granite 3.2 and 3.3."""

    opening = ("Here is my thought process:", "Here's my thought process:")
    closing = ("Here is my response:", "Here's my response:")


class _Marked(ParserState):
    """One choice. White space behind a mark is dropped."""

    def __init__(
        self, opening: tuple[str, ...], closing: tuple[str, ...], *, is_inside: bool
    ) -> None:
        self._opening, self._closing, self._is_inside = opening, closing, is_inside
        self._held, self._phase, self._blank = "", "before", is_inside

    def feed(self, delta: str) -> Sequence[ParserEvent]:
        self._held += delta
        events: list[ParserEvent] = []
        if self._phase == "before":
            self._begin(events)
        if self._phase == "inside":
            self._think(events)
        if self._phase == "behind":
            self._tell(events, len(self._held), is_thought=False)
        return events

    def finish(self) -> Sequence[ParserEvent]:
        events: list[ParserEvent] = []
        is_thought = self._phase == "inside" or (self._phase == "before" and self._is_inside)
        self._tell(events, len(self._held), is_thought=is_thought)
        return events

    def _begin(self, events: list[ParserEvent]) -> None:
        text = self._held.lstrip()
        mark = next((mark for mark in self._opening if text.startswith(mark)), None)
        if mark is not None:
            self._held, self._phase, self._blank = text[len(mark) :], "inside", True
        elif text and not any(mark.startswith(text) for mark in self._opening):
            self._phase = "inside" if self._is_inside else "behind"

    def _think(self, events: list[ParserEvent]) -> None:
        found = [(at, m) for m in self._closing if (at := self._held.find(m)) >= 0]
        if found:
            at, mark = min(found)
            self._tell(events, at, is_thought=True)
            self._held, self._phase, self._blank = self._held[len(mark) :], "behind", True
            return
        kept = max(
            next(n for n in range(len(m) - 1, -1, -1) if self._held.endswith(m[:n]))
            for m in self._closing
        )
        self._tell(events, len(self._held) - kept, is_thought=True)

    def _tell(self, events: list[ParserEvent], length: int, *, is_thought: bool) -> None:
        text, self._held = self._held[:length], self._held[length:]
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        if text:
            events.append(ReasoningDelta(text) if is_thought else ContentDelta(text))
