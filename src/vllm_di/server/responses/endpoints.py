"""``/v1/responses``: create, get, delete, cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Generation
from vllm_di.server.auth import OWNER
from vllm_di.server.body import read_request
from vllm_di.server.chat import begin_chat
from vllm_di.server.endpoint import respond
from vllm_di.server.errors import as_request_error
from vllm_di.server.generation import running
from vllm_di.server.observers import WORK
from vllm_di.server.responses.answer import ResponsesAnswer
from vllm_di.server.responses.request import ResponsesRequest, chat_request, messages_of
from vllm_di.server.responses.store import Entry, ResponseStore
from vllm_di.server.sending import send_json
from vllm_di.server.service import Service


class Responses:
    """The endpoints, round one store. An ASGI application is the one that creates."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._store: ResponseStore | None = None
        self._tasks = set[asyncio.Task[None]]()

    @property
    def store(self) -> ResponseStore:
        """What was stored of this server."""
        if self._store is None:
            self._store = ResponseStore(self._service.config.response_store_bytes)
        return self._store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        service.admission.check_open()
        request = await read_request(Request(scope, receive), service, ResponsesRequest)
        service.check_generates()
        owner: bytes = scope[OWNER]
        if request.background and (request.stream or request.store is False):
            raise RequestError(
                "background goes with store=true and without stream", param="background"
            )
        earlier = self._earlier(owner, request.previous_response_id)
        conversation = [*earlier, *messages_of(request.input)]
        chat = chat_request(request, conversation)
        generation, (parser,) = await begin_chat(service, chat, "resp")

        def keep(response: dict[str, Any], message: dict[str, Any]) -> None:
            if request.store is not False:
                said = {"content": message["content"] or ""}
                message = {k: v for k, v in message.items() if v is not None} | said
                self.store.put(owner, response, [*conversation, message])

        answer = ResponsesAnswer(
            request,
            parser,
            response_id=generation.request_id,
            model=service.config.name,
            num_prompt=len(generation.prompt_token_ids),
            keep=keep,
        )
        if request.background:
            body = await self._begin(owner, generation, answer, conversation)
            await send_json(send, body)
        else:
            scope[WORK].generations = [generation]
            await respond(service, [generation], answer, bool(request.stream), receive, send)

    async def get(self, request: Request) -> Response:
        """A stored response."""
        if request.query_params.get("stream", "false") == "true":
            raise RequestError("stream is not supported here", param="stream")
        return _json(self._entry(request).response)

    async def delete(self, request: Request) -> Response:
        """Forget a response; one that still runs ends."""
        await _end(self._entry(request))
        name = request.path_params["id"]
        self.store.delete(request.scope[OWNER], name)
        return _json(orjson.dumps({"id": name, "object": "response", "deleted": True}))

    async def cancel(self, request: Request) -> Response:
        """End one that runs in the background; one that has ended stays as it is."""
        entry = self._entry(request)
        if not orjson.loads(entry.response)["background"]:
            raise RequestError("only a response with background=true can be cancelled")
        await _end(entry)
        return _json(self._entry(request).response)

    def _entry(self, request: Request) -> Entry:
        return self.store.get(request.scope[OWNER], request.path_params["id"])

    def _earlier(self, owner: bytes, previous: str | None) -> list[Any]:
        if previous is None:
            return []
        try:
            entry = self.store.get(owner, previous)
        except RequestError as error:
            error.param = "previous_response_id"
            raise
        if entry.task is not None:
            raise RequestError(
                f"the response {previous!r} has not ended", param="previous_response_id"
            )
        messages: list[Any] = orjson.loads(entry.messages)
        return messages

    async def _begin(
        self,
        owner: bytes,
        generation: Generation,
        answer: ResponsesAnswer,
        conversation: Sequence[Any],
    ) -> bytes:
        """Run in the background; the response as it is at the beginning. Raises what a response
        that is waited for raises before its first token."""
        messages = [*conversation]
        begun = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                async with running(
                    self._service, [generation], _never, lambda: 0, patience=None
                ) as updates:
                    begun.set_result(None)
                    async for item in updates:
                        if item is not None:
                            answer.add(*item)
                answer.body()
            except asyncio.CancelledError:
                self.store.put(owner, answer.response("cancelled"), messages)
            except Exception as error:
                if not begun.done():
                    begun.set_exception(error)
                    return
                told = as_request_error(error)
                self.store.put(owner, answer.response("failed", told), messages)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await begun
        entry = self.store.put(owner, answer.response("in_progress"), messages)
        entry.task = task
        return entry.response


async def _end(entry: Entry) -> None:
    if entry.task is not None:
        entry.task.cancel()
        await asyncio.wait({entry.task})


async def _never() -> Message:
    """No client holds the connection."""
    await asyncio.Event().wait()
    raise AssertionError


def _json(body: bytes) -> Response:
    return Response(body, headers={"content-type": "application/json"})
