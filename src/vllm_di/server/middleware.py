"""The middleware around all endpoints."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_di.components.interfaces import Metrics
from vllm_di.errors import RequestError
from vllm_di.server.auth import OWNER, ApiKeys
from vllm_di.server.errors import ClientGone, as_request_error, error_body, retry_after
from vllm_di.server.hosts import Hosts, to_origin_form
from vllm_di.server.observers import OTHER, WORK, EndedRequest, Observer, Work
from vllm_di.server.request_id import HEADER, request_id
from vllm_di.server.sending import send_json

MAX_HEAD_BYTES = 32 * 1024
_PART_BYTES = 32 * 1024
_CLIENT_GONE = 499
"""nginx's status for a connection that the client closed; only metrics see it."""

log = logging.getLogger(__name__)


class RequestMiddleware:
    """Checks host and key, gives the request an id, counts it, tells the observers, and turns
    exceptions into error responses in the form of the API that was asked."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        hosts: Hosts,
        metrics: Metrics,
        handlers: Mapping[object, str],
        observers: Sequence[Observer] = (),
    ) -> None:
        self._app = app
        self._keys = keys
        self._hosts = hosts
        self._metrics = metrics
        self._handlers = handlers
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no WebSockets: the listener turns them off in uvicorn as well
        began, started = time.time(), time.monotonic()
        to_origin_form(scope)
        headers: dict[bytes, bytes] = dict(scope["headers"])
        own_id = request_id(headers)
        scope[WORK] = Work()
        status = 0
        code: str | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (HEADER, own_id)]
            for part in _parts(message):
                await send(part)

        try:
            _check_head(scope)
            self._hosts.check(headers.get(b"host"))
            _check_length(headers)
            owner = self._keys.owner(scope["path"], headers)
            if owner is None:
                raise RequestError(
                    "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                    code="invalid_api_key",
                    status=401,
                )
            scope[OWNER] = owner
            await self._app(scope, receive, send_with_id)
        except (ClientGone, asyncio.CancelledError) as error:
            status, code = status or _CLIENT_GONE, "client_gone"
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            refusal = as_request_error(error)
            code = refusal.code or str(refusal.status)
            if refusal.code == "internal_error":
                name = own_id.decode()
                fields = {"fields": {"request_id": name}}
                log.error("request %s failed", name, exc_info=error, extra=fields)
            if status == 0:
                await send_json(
                    send_with_id,
                    error_body(refusal, scope["path"]),
                    refusal.status,
                    _error_headers(refusal),
                )
        finally:
            handler = self._handlers.get(scope.get("endpoint"), OTHER)
            seconds = time.monotonic() - started
            self._metrics.http(handler, status or 500, seconds)
            if self._observers:
                ended = EndedRequest(
                    scope=scope,
                    route=handler,
                    request_id=own_id.decode(),
                    status=status or 500,
                    error=code,
                    started=began,
                    seconds=seconds,
                )
                for observer in self._observers:
                    observer.ended(ended)


def _check_head(scope: Scope) -> None:
    """h11 accepts other HTTP versions, and a head of any length if it comes in one piece."""
    if scope["http_version"] not in ("1.0", "1.1"):
        raise RequestError("this server speaks HTTP/1.0 and 1.1", code="http_version", status=505)
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > MAX_HEAD_BYTES:
        raise RequestError(
            f"the request's head is longer than {MAX_HEAD_BYTES} bytes",
            code="head_too_large",
            status=431,
        )


def _parts(message: Message) -> Iterator[Message]:
    """Split a long body: a writer waits for its reader only between two messages."""
    body: bytes = message.get("body", b"")
    if len(body) <= _PART_BYTES:
        yield message
        return
    for start in range(0, len(body), _PART_BYTES):
        end = start + _PART_BYTES
        more = end < len(body) or message.get("more_body", False)
        yield {**message, "body": body[start:end], "more_body": more}


def _check_length(headers: Mapping[bytes, bytes]) -> None:
    """Refuse a body with two lengths. A proxy may trust the other one and see a second request in
    the body: request smuggling (RFC 9112, 6.1)."""
    if b"transfer-encoding" in headers and b"content-length" in headers:
        raise RequestError(
            "the request has both Content-Length and Transfer-Encoding", code="invalid_http"
        )


def _error_headers(error: RequestError) -> list[tuple[bytes, bytes]]:
    headers = []
    if (seconds := retry_after(error)) is not None:
        headers.append((b"retry-after", str(seconds).encode()))
    if error.status == 505 or error.code == "invalid_http":
        headers.append((b"connection", b"close"))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers
