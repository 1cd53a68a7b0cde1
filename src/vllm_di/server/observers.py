"""Who hears of each request that has ended: the access log, and traces."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from starlette.types import Scope

from vllm_di.components.interfaces import RequestTimes, TracedRequest, Tracing
from vllm_di.frontend.processor import Generation
from vllm_di.server.rarely import Rarely

WORK = "vllm_di.work"
"""Key of a scope: the request's ``Work``."""
OTHER = "other"
"""Stands for the path of a request that no endpoint took."""
_MOST_PATH = 200
_TRACE_HEADERS = (b"traceparent", b"tracestate")
Name = Literal["chat", "text_completion", "embeddings"]
_OPERATIONS: dict[str, Name] = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Work:
    """What the engine does for one request. Its endpoint says it here."""

    generations: Sequence[Generation] = ()
    pooled: list[RequestTimes] = field(default_factory=list)
    """Of each text that was pooled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """One HTTP request whose answer has ended, or whose client has gone."""

    scope: Scope
    route: str
    request_id: str
    status: int
    error: str | None
    """The code of the error that ended it."""
    started: float
    """Seconds since the epoch."""
    seconds: float


class Observer(ABC):
    """Called in the event loop: it must not wait, nor raise."""

    @abstractmethod
    def ended(self, request: EndedRequest) -> None: ...


class AccessLog(Observer):
    """One line for each request. Queries of URLs are left out: they may hold secrets."""

    def ended(self, request: EndedRequest) -> None:
        scope = request.scope
        client = ":".join(map(str, scope.get("client") or ("unix",)))
        method, milliseconds = scope["method"][:20], request.seconds * 1000
        path = scope["raw_path"][:_MOST_PATH].decode("ascii", "backslashreplace")
        log.info(
            '%s "%s %s" %d %.1f ms %s',
            client,
            method,
            path,
            request.status,
            milliseconds,
            request.request_id,
            extra={
                "fields": {
                    "request_id": request.request_id,
                    "client": client,
                    "method": method,
                    "path": path,
                    "status": request.status,
                    "milliseconds": round(milliseconds, 3),
                }
            },
        )


class Tracer(Observer):
    """Tells ``tracing`` of requests with a body that an endpoint took."""

    def __init__(self, tracing: Tracing, model: str) -> None:
        self._tracing, self._model = tracing, model
        self._failures = Rarely(log)

    def ended(self, request: EndedRequest) -> None:
        if request.route == OTHER or request.scope["method"] != "POST":
            return
        try:
            self._tracing.record(self._traced(request))
        except Exception as error:
            self._failures.warning("a request could not be traced: %r", error)

    def _traced(self, request: EndedRequest) -> TracedRequest:
        work: Work = request.scope[WORK]
        choices = [
            generation.times(one.request_id)
            for generation in work.generations
            for one in generation.requests
        ]
        first = work.generations[0] if work.generations else None
        headers: dict[bytes, bytes] = dict(request.scope["headers"])
        return TracedRequest(
            method=request.scope["method"],
            route=request.route,
            operation=_OPERATIONS.get(request.route),
            model=self._model,
            request_id=request.request_id,
            response_id=None if first is None else first.request_id,
            status=request.status,
            error=request.error,
            started=request.started,
            ended=request.started + request.seconds,
            headers={
                name.decode(): headers[name].decode("latin-1")
                for name in _TRACE_HEADERS
                if name in headers
            },
            params=None if first is None else first.params,
            choices=choices or work.pooled,
        )
