"""An answer in the form of OpenAI's Responses: items, or their events in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import orjson

from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Update
from vllm_di.server.answer import Answer
from vllm_di.server.chat import ChatChoice
from vllm_di.server.parsing import ChoiceParser, MessageDelta, ToolCall
from vllm_di.server.responses.request import ResponsesRequest
from vllm_di.server.service import new_id

Keep = Callable[[dict[str, Any], dict[str, Any]], None]


class ResponsesAnswer(Answer):
    """Items follow one another: reasoning, text and function calls as the model gave them. Text of
    spaces alone around calls is no item."""

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
            "output": self._items.whole(),
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


Kind = Literal["reasoning", "message"]
_PREFIX: dict[Kind, str] = {"reasoning": "rs", "message": "msg"}
_PART: dict[Kind, str] = {"reasoning": "reasoning_text", "message": "output_text"}


class _Items:
    """The items so far; the last one may be open. Each method gives the events of what it did."""

    def __init__(self, event: Callable[..., bytes]) -> None:
        self._event = event
        self._items: list[dict[str, Any]] = []
        self._pieces: list[str] = []
        """Of the open item."""
        self._open: Kind | int | None = None
        """What the last item is, or the index of its call; None when it is closed."""
        self._spaces = ""
        """Text that becomes part of an item once other text follows it."""

    def add(self, delta: MessageDelta) -> list[bytes]:
        events: list[bytes] = []
        if delta.reasoning:
            events += self._text("reasoning", delta.reasoning)
        if delta.content:
            text = self._spaces + delta.content
            if self._open == "message" or not text.isspace():
                self._spaces = ""
                events += self._text("message", text)
            else:
                self._spaces = text
        for index, call in delta.calls.items():
            events += self._call(index, call)
        return events

    def close(self) -> list[bytes]:
        """End the open item."""
        kind, self._open = self._open, None
        if kind is None:
            return []
        item, text = self._items[-1], "".join(self._pieces)
        item["status"] = "completed"
        self._pieces = []
        if isinstance(kind, int):
            item["arguments"] = text
            done = "response.function_call_arguments.done"
            events = [self._told(done, arguments=text, name=item["name"])]
        else:
            item["content"] = [_part(kind, text)]
            place: dict[str, Any] = {"content_index": 0}
            extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
            events = [
                self._told(f"response.{_PART[kind]}.done", text=text, **place, **extra),
                self._told("response.content_part.done", part=item["content"][0], **place),
            ]
        index = len(self._items) - 1
        return [
            *events,
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def whole(self) -> list[dict[str, Any]]:
        """All items that have ended."""
        return self._items if self._open is None else self._items[:-1]

    def _text(self, kind: Kind, text: str) -> list[bytes]:
        place: dict[str, Any] = {"content_index": 0}
        events = []
        if self._open != kind:
            item: dict[str, Any] = {"id": new_id(_PREFIX[kind]), "type": kind}
            if kind == "message":
                item["role"] = "assistant"
            else:
                item["summary"] = []
            events = self._begin(kind, item | {"status": "in_progress", "content": []})
            part = _part(kind, "")
            events.append(self._told("response.content_part.added", part=part, **place))
        self._pieces.append(text)
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        name = f"response.{_PART[kind]}.delta"
        return [*events, self._told(name, delta=text, **place, **extra)]

    def _call(self, index: int, call: ToolCall) -> list[bytes]:
        events = []
        if (begun := call.begun) is not None:
            self._spaces = ""
            item = {"id": new_id("fc"), "type": "function_call", "status": "in_progress"}
            item |= {"call_id": begun.id, "name": begun.name, "arguments": ""}
            events = self._begin(index, item)
        if arguments := "".join(call.arguments):
            if self._open != index:
                raise RuntimeError(f"a parser gave arguments of call {index} after its end")
            self._pieces.append(arguments)
            events.append(self._told("response.function_call_arguments.delta", delta=arguments))
        return events

    def _begin(self, kind: Kind | int, item: dict[str, Any]) -> list[bytes]:
        events = self.close()
        self._items.append(item)
        self._open = kind
        index = len(self._items) - 1
        return [*events, self._event("response.output_item.added", output_index=index, item=item)]

    def _told(self, kind: str, /, **fields: Any) -> bytes:
        """An event of the open, or just closed, item."""
        index = len(self._items) - 1
        return self._event(kind, item_id=self._items[-1]["id"], output_index=index, **fields)


def _part(kind: Kind, text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _PART[kind], "text": text}
    return part | {"annotations": [], "logprobs": []} if kind == "message" else part
