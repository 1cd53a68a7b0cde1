"""An answer in the form of OpenAI's Responses: items, or their events in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import orjson

from vllm_di.components.interfaces import ToolCallBegun
from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Update
from vllm_di.server.answer import Answer
from vllm_di.server.blocks import Blocks, Text
from vllm_di.server.chat import ChatChoice
from vllm_di.server.parsing import ChoiceParser
from vllm_di.server.responses.request import ResponsesRequest
from vllm_di.server.service import new_id

Keep = Callable[[dict[str, Any], dict[str, Any]], None]


class ResponsesAnswer(Answer):
    """A response of items."""

    def __init__(
        self,
        request: ResponsesRequest,
        parser: ChoiceParser,
        *,
        response_id: str,
        model: str,
        num_prompt: int,
        keep: Keep,
    ) -> None:
        """``keep`` is called once, with the response and its message, when it ends well."""
        self._choice = ChatChoice(parser)
        self._num_prompt = num_prompt
        self._num_cached = self._num_generated = self._num_reasoning = 0
        self._num_events = 0
        self._items = _Items(self._event)
        self._keep = keep
        self._head = _head(request, response_id, model)

    def response(self, status: str, error: RequestError | None = None) -> dict[str, Any]:
        """The response as it is now."""
        reason = self._choice.finish_reason
        incomplete = {"length": "max_output_tokens"}.get(reason or "", reason)
        told = error and {"code": error.code or "server_error", "message": error.message}
        return self._head | {
            "status": status,
            "error": told,
            "incomplete_details": {"reason": incomplete} if status == "incomplete" else None,
            "output": self._items.ended,
            "usage": self._usage() if reason is not None else None,
        }

    def events(self, position: int, update: Update) -> bytes:
        begin = b""
        if self._num_events == 0:
            response = self.response("in_progress")
            begin = self._event("response.created", response=response)
            begin += self._event("response.in_progress", response=response)
        return begin + b"".join(self._feed(update))

    def add(self, position: int, update: Update) -> None:
        self._feed(update)

    def closing_events(self) -> bytes:
        end = b"".join(self._items.close())
        response = self._ended()
        return end + self._event(f"response.{response['status']}", response=response)

    def body(self) -> dict[str, Any]:
        self._items.close()
        return self._ended()

    def error_event(self, error: RequestError) -> bytes:
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _ended(self) -> dict[str, Any]:
        is_whole = self._choice.finish_reason in ("stop", "tool_calls")
        response = self.response("completed" if is_whole else "incomplete")
        self._keep(response, self._choice.parts.message())
        return response

    def _feed(self, update: Update) -> list[bytes]:
        self._num_generated += len(update.token_ids)
        self._num_cached = max(self._num_cached, update.num_cached_tokens)
        delta = self._choice.parse(update)
        self._choice.parts.add(delta)
        if delta.reasoning:
            self._num_reasoning += len(update.token_ids)
        return self._items.add(delta)

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self._num_prompt,
            "input_tokens_details": {"cached_tokens": self._num_cached},
            "output_tokens": self._num_generated,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning},
            "total_tokens": self._num_prompt + self._num_generated,
        }

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(event))


def _head(request: ResponsesRequest, response_id: str, model: str) -> dict[str, Any]:
    reasoning = request.reasoning
    effort = reasoning.effort if reasoning else None
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": effort, "summary": None},
        "store": request.store is not False,
        "background": bool(request.background),
        "temperature": request.temperature,
        "text": {"format": (request.text and request.text.format) or {"type": "text"}},
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": request.tools or [],
        "top_p": request.top_p,
        "truncation": "disabled",
    }


_PREFIX: dict[Text, str] = {"reasoning": "rs", "text": "msg"}
_PART: dict[Text, str] = {"reasoning": "reasoning_text", "text": "output_text"}


class _Items(Blocks):
    """The blocks as items of a response."""

    def __init__(self, event: Callable[..., bytes]) -> None:
        super().__init__()
        self.ended: list[dict[str, Any]] = []
        self._item: dict[str, Any] = {}
        self._event = event

    def _begin(self, kind: Text | int, call: ToolCallBegun | None) -> list[bytes]:
        item: dict[str, Any] = {"status": "in_progress"}
        self._item = item
        if isinstance(kind, int):
            assert call is not None
            item |= {"id": new_id("fc"), "type": "function_call"}
            item |= {"call_id": call.id, "name": call.name, "arguments": ""}
            return [self._added()]
        item["id"] = new_id(_PREFIX[kind])
        if kind == "text":
            item |= {"type": "message", "role": "assistant", "content": []}
        else:
            item |= {"type": "reasoning", "summary": [], "content": []}
        added = self._added()  # events are numbered as they are made
        part = _part(kind, "")
        return [added, self._told("response.content_part.added", part=part, content_index=0)]

    def _more(self, kind: Text | int, text: str) -> bytes:
        if isinstance(kind, int):
            return self._told("response.function_call_arguments.delta", delta=text)
        return self._told(f"response.{_PART[kind]}.delta", delta=text, **_place(kind))

    def _end(self, kind: Text | int, text: str) -> list[bytes]:
        item = self._item
        item["status"] = "completed"
        if isinstance(kind, int):
            item["arguments"] = text
            done = "response.function_call_arguments.done"
            events = [self._told(done, arguments=text, name=item["name"])]
        else:
            part = _part(kind, text)
            item["content"] = [part]
            events = [
                self._told(f"response.{_PART[kind]}.done", text=text, **_place(kind)),
                self._told("response.content_part.done", part=part, content_index=0),
            ]
        index = len(self.ended)
        self.ended.append(item)
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]

    def _added(self) -> bytes:
        index = len(self.ended)
        return self._event("response.output_item.added", output_index=index, item=self._item)

    def _told(self, kind: str, /, **fields: Any) -> bytes:
        """An event of the open item."""
        place = {"item_id": self._item["id"], "output_index": len(self.ended)}
        return self._event(kind, **place, **fields)


def _place(kind: Text) -> dict[str, Any]:
    return {"content_index": 0} | ({"logprobs": []} if kind == "text" else {})


def _part(kind: Text, text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _PART[kind], "text": text}
    return part | {"annotations": [], "logprobs": []} if kind == "text" else part
