"""Sends an answer, whole or as server-sent events."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from starlette.types import Send

from vllm_di.server.answer import Answer
from vllm_di.server.errors import ClientGone, as_request_error
from vllm_di.server.updates import Updates

_KEEP_ALIVE = b": keep-alive\n\n"
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventWriter:
    """Writes server-sent events to a connection. The head goes with the first one (an answer's, or
    the first keep-alive), so that an early refusal still has its own status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._num_unsent = 0
        self.has_begun = False

    def num_unsent(self) -> int:
        """Bytes that ``write`` has taken and not yet sent."""
        return self._num_unsent

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Return once the connection has taken the bytes. ``more``: whether others will follow."""
        if not self.has_begun:
            self.has_begun = True
            head = {"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM}
            await self._send(head)
        self._num_unsent = len(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._num_unsent = 0


async def send_events(updates: Updates, answer: Answer, writer: EventWriter) -> None:
    """Each update as it comes, and a keep-alive comment in each silence. Once the head is sent, an
    error becomes the last event; it is raised in any case."""
    try:
        async for item in updates:
            if data := _KEEP_ALIVE if item is None else answer.events(*item):
                await writer.write(data)
        await writer.write(answer.closing_events(), more=False)
    except Exception as error:
        if writer.has_begun and not isinstance(error, ClientGone):
            await writer.write(answer.error_event(as_request_error(error)), more=False)
        raise


async def send_whole(updates: Updates, answer: Answer, send: Send) -> None:
    """The whole answer, when all its updates have come."""
    async for item in updates:
        if item is not None:
            answer.add(*item)
    await send_json(send, orjson.dumps(answer.body()))


async def send_json(
    send: Send, body: bytes, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """A whole JSON answer."""
    length = str(len(body)).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", length), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
