"""An answer in Anthropic's form: a message of blocks, or its events in order."""

from __future__ import annotations

from typing import Any, Literal

import orjson

from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Update
from vllm_di.server.answer import Answer
from vllm_di.server.anthropic.errors import anthropic_error
from vllm_di.server.chat import ChatChoice
from vllm_di.server.parsing import ChoiceParser, MessageDelta, ToolCall

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


class MessagesAnswer(Answer):
    """Blocks follow one another: reasoning, text and tool calls as the model gave them. Text of
    spaces alone around tool calls is no block, because nobody accepts such a block back."""

    def __init__(
        self, parser: ChoiceParser, *, message_id: str, model: str, num_prompt: int
    ) -> None:
        self._choice = ChatChoice(parser)
        self._head: dict[str, Any] = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._num_prompt = num_prompt
        self._num_cached = self._num_generated = 0
        self._blocks = _Blocks()
        self._has_begun = False

    def events(self, position: int, update: Update) -> bytes:
        begin = self._begin(update)
        return begin + b"".join(self._feed(update))

    def add(self, position: int, update: Update) -> None:
        self._begin(update)
        self._feed(update)

    def closing_events(self) -> bytes:
        end = self._blocks.close()
        delta = {
            "type": "message_delta",
            "delta": self._stop(),
            "usage": self._usage(),
        }
        return b"".join([*end, _event(delta), _event({"type": "message_stop"})])

    def body(self) -> dict[str, Any]:
        self._blocks.close()
        return self._head | {
            "content": self._blocks.whole(),
            **self._stop(),
            "usage": self._usage(),
        }

    def error_event(self, error: RequestError) -> bytes:
        return b"event: error\ndata: " + anthropic_error(error) + b"\n\n"

    def _begin(self, update: Update) -> bytes:
        self._num_cached = max(self._num_cached, update.num_cached_tokens)
        if self._has_begun:
            return b""
        self._has_begun = True
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = self._head | empty | {"usage": self._usage()}
        return _event({"type": "message_start", "message": message})

    def _feed(self, update: Update) -> list[bytes]:
        self._num_generated += len(update.token_ids)
        return self._blocks.add(self._choice.parse(update))

    def _stop(self) -> dict[str, Any]:
        reason, stopped = self._choice.finish_reason, self._choice.stop_reason
        if isinstance(stopped, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stopped}
        return {"stop_reason": _STOP_REASONS.get(reason or "", reason), "stop_sequence": None}

    def _usage(self) -> dict[str, int]:
        """Anthropic's ``input_tokens`` are those that were not read from the cache."""
        return {
            "input_tokens": self._num_prompt - self._num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._num_cached,
            "output_tokens": self._num_generated,
        }


Kind = Literal["thinking", "text"]
"""Both have their text in a field of the same name."""


class _Blocks:
    """The blocks so far; the last one may be open. Each method gives the events of what it did."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []
        self._pieces: list[list[str]] = []
        self._open: Kind | int | None = None
        """What the last block is, or the index of its call; None when it is closed."""
        self._spaces = ""
        """Text that becomes part of a block once other text follows it."""

    def add(self, delta: MessageDelta) -> list[bytes]:
        events: list[bytes] = []
        if delta.reasoning:
            events += self._text("thinking", delta.reasoning)
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
        if self._open is None:
            return []
        self._open = None
        return [_event({"type": "content_block_stop", "index": len(self._blocks) - 1})]

    def whole(self) -> list[dict[str, Any]]:
        """All blocks, for the answer as one body."""
        for block, pieces in zip(self._blocks, self._pieces, strict=True):
            text = "".join(pieces)
            if block["type"] == "tool_use":
                block["input"] = _arguments(text)
            else:
                block[block["type"]] = text
        return self._blocks

    def _text(self, kind: Kind, text: str) -> list[bytes]:
        events = []
        if self._open != kind:
            block = {"type": kind, kind: ""}
            if kind == "thinking":
                block["signature"] = ""  # the official client wants one; there is nothing to sign
            events = self._begin(kind, block)
        self._pieces[-1].append(text)
        return [*events, self._delta({"type": f"{kind}_delta", kind: text})]

    def _call(self, index: int, call: ToolCall) -> list[bytes]:
        events = []
        if call.begun is not None:
            self._spaces = ""
            block = {"type": "tool_use", "id": call.begun.id, "name": call.begun.name, "input": {}}
            events = self._begin(index, block)
        if arguments := "".join(call.arguments):
            if self._open != index:
                raise RuntimeError(f"a parser gave arguments of call {index} after its end")
            self._pieces[-1].append(arguments)
            events.append(self._delta({"type": "input_json_delta", "partial_json": arguments}))
        return events

    def _begin(self, kind: Kind | int, block: dict[str, Any]) -> list[bytes]:
        events = self.close()
        self._blocks.append(block)
        self._pieces.append([])
        self._open = kind
        start = {"type": "content_block_start", "index": len(self._blocks) - 1}
        return [*events, _event(start | {"content_block": block})]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        index = len(self._blocks) - 1
        return _event({"type": "content_block_delta", "index": index, "delta": delta})


def _arguments(text: str) -> Any:
    """A call that was cut off, or that a model wrote badly, has no valid arguments: its text is
    kept beside them, so that nothing is lost."""
    try:
        value = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return {"__invalid_json__": text}
    return value if isinstance(value, dict) else {"__invalid_json__": text}


def _event(fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (fields["type"].encode(), orjson.dumps(fields))
