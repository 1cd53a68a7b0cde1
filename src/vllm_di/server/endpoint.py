"""An endpoint that generates."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from vllm_di.frontend.processor import Generation
from vllm_di.server.answer import Answer
from vllm_di.server.body import read_request
from vllm_di.server.generation import running
from vllm_di.server.observers import WORK
from vllm_di.server.protocol import StreamRequest
from vllm_di.server.sending import EventWriter, send_events, send_whole
from vllm_di.server.service import Service

G = TypeVar("G", bound=StreamRequest)


class GenerateEndpoint(Generic[G]):
    """One request as a stream through small steps: the body becomes a typed request, this becomes
    generations and an answer; the generations give updates, the answer turns them into bytes, the
    writer sends these. An ASGI application, because it watches the connection while it answers."""

    def __init__(
        self,
        service: Service,
        kind: type[G],
        start: Callable[[Service, G], Awaitable[tuple[list[Generation], Answer]]],
    ) -> None:
        self._service, self._kind, self._start = service, kind, start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        service.admission.check_open()
        request = await read_request(Request(scope, receive), service, self._kind)
        service.check_generates()
        generations, answer = await self._start(service, request)
        scope[WORK].generations = generations
        await respond(service, generations, answer, bool(request.stream), receive, send)


async def respond(
    service: Service,
    generations: list[Generation],
    answer: Answer,
    stream: bool,
    receive: Receive,
    send: Send,
) -> None:
    """Run the generations and send their answer."""
    patience = service.config.keep_alive_seconds if stream else None
    writer = EventWriter(send)
    # The engine may be done long before the client has read all: its places are free by then.
    async with running(
        service, generations, receive, writer.num_unsent, patience=patience
    ) as updates:
        if stream:
            await send_events(updates, answer, writer)
        else:
            await send_whole(updates, answer, send)
