"""Sends an answer, whole or as server-sent events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.types import Receive, Send

from vllm_di.frontend.processor import Generation, Update
from vllm_di.server.errors import ClientGone, as_request_error, error_body
from vllm_di.server.generation import Run
from vllm_di.server.protocol import GenerateRequest
from vllm_di.server.service import Service

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Answer(ABC):
    """One request's answer in the making: fed with updates, it gives events or, at the end, the
    whole body. What does not change between events is encoded once."""

    def __init__(
        self, service: Service, request: GenerateRequest, generations: Sequence[Generation]
    ) -> None:
        options = request.stream_options
        self.service = service
        self.generations = generations
        self.is_stream = bool(request.stream)
        self._wants_usage = bool(options and options.include_usage)
        self._usage_in_each = self._wants_usage and bool(options and options.continuous_usage_stats)

    @abstractmethod
    def events(self, position: int, update: Update) -> bytes:
        """The events of one update of generation ``position``; empty when there is nothing to
        tell."""

    @abstractmethod
    def closing_events(self) -> bytes:
        """What comes before ``[DONE]``."""

    @abstractmethod
    def take(self, position: int, update: Update) -> None:
        """Keep one update for ``body``."""

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The whole answer."""

    def usage(self) -> dict[str, Any]:
        """Tokens so far, in OpenAI's form."""
        prompt = sum(len(g.prompt_token_ids) for g in self.generations)
        completion = sum(g.num_generated_tokens for g in self.generations)
        cached = sum(g.num_cached_tokens for g in self.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _end_of_event(self) -> bytes:
        """What follows ``"choices":[...]`` in an event."""
        if self._usage_in_each:
            return b',"usage":' + orjson.dumps(self.usage()) + b"}\n\n"
        return b',"usage":null}\n\n' if self._wants_usage else b"}\n\n"


async def send_answer(answer: Answer, receive: Receive, send: Send) -> None:
    """Run an answer's generations and send what comes of them. The engine is done before the client
    has read all: its places are free by then."""
    service = answer.service
    config = service.config
    run = Run(
        answer.generations,
        service.engine,
        service.admission,
        service.metrics,
        receive,
        timeout=config.request_timeout_seconds,
        max_unsent_bytes=config.max_unsent_bytes,
    )
    async with run:
        if answer.is_stream:
            await _send_events(answer, run, send, config.keep_alive_seconds)
        else:
            await _send_whole(answer, run, send)


async def _send_whole(answer: Answer, run: Run, send: Send) -> None:
    while not run.exhausted:
        item = await run.next()
        assert item is not None, "without patience, next waits"
        answer.take(*item)
    await send_json(send, orjson.dumps(answer.body()))


async def _send_events(answer: Answer, run: Run, send: Send, keep_alive: float) -> None:
    """The head is sent with the first event (or the first silence), so that an early refusal still
    has its own status. After that an error is the last event."""
    has_started = False

    async def write(data: bytes, *, more: bool = True) -> None:
        nonlocal has_started
        if not has_started:
            has_started = True
            await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        run.num_writing = len(data)
        await send({"type": "http.response.body", "body": data, "more_body": more})
        run.num_writing = 0

    try:
        while not run.exhausted:
            item = await run.next(keep_alive)
            if data := KEEP_ALIVE if item is None else answer.events(*item):
                await write(data)
        await write(answer.closing_events() + DONE, more=False)
    except Exception as error:
        if has_started and not isinstance(error, ClientGone):
            await write(b"data: " + error_body(as_request_error(error)) + b"\n\n", more=False)
        raise


async def send_json(
    send: Send, body: bytes, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """A whole JSON answer."""
    length = str(len(body)).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", length), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
