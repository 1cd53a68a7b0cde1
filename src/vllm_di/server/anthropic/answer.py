"""An answer in Anthropic's form: a message of blocks, or its events in order."""

from __future__ import annotations

from typing import Any

import orjson

from vllm_di.components.interfaces import ToolCallBegun
from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Update
from vllm_di.server.answer import Answer
from vllm_di.server.anthropic.errors import anthropic_error
from vllm_di.server.blocks import Blocks, Text
from vllm_di.server.chat import ChatChoice
from vllm_di.server.parsing import ChoiceParser

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


class MessagesAnswer(Answer):
    """A message of blocks. Nobody accepts a block of spaces alone back, so there is none."""

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
            "content": self._blocks.ended,
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


class _Blocks(Blocks):
    """Anthropic's, as dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[dict[str, Any]] = []
        self._block: dict[str, Any] = {}

    def _begin(self, kind: Text | int, call: ToolCallBegun | None) -> list[bytes]:
        if call is not None:
            self._block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        elif kind == "text":
            self._block = {"type": "text", "text": ""}
        else:  # the official client wants a signature; there is nothing to sign
            self._block = {"type": "thinking", "thinking": "", "signature": ""}
        return [self._event("content_block_start", content_block=self._block)]

    def _more(self, kind: Text | int, text: str) -> bytes:
        if kind == "text":
            delta = {"type": "text_delta", "text": text}
        elif kind == "reasoning":
            delta = {"type": "thinking_delta", "thinking": text}
        else:
            delta = {"type": "input_json_delta", "partial_json": text}
        return self._event("content_block_delta", delta=delta)

    def _end(self, kind: Text | int, text: str) -> list[bytes]:
        event = self._event("content_block_stop")
        if isinstance(kind, int):
            self._block["input"] = _arguments(text)
        else:
            self._block["text" if kind == "text" else "thinking"] = text
        self.ended.append(self._block)
        return [event]

    def _event(self, kind: str, **fields: Any) -> bytes:
        return _event({"type": kind, "index": len(self.ended), **fields})


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
