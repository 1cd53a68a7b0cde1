"""A client's connection: uvicorn's, with deadlines, limits, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from vllm_di.errors import ConfigError, RequestError
from vllm_di.server import request_id
from vllm_di.server.config import ServerConfig
from vllm_di.server.errors import openai_error, retry_after
from vllm_di.server.rarely import Rarely

HIGH_WATER = 32 * 1024
"""Bytes that a transport buffers before its writer has to wait."""
_LINGER_SECONDS = 1.0
"""A refused client may still be sending: closing at once would reset the connection and lose the
response."""
MAX_REFUSALS = 64
"""Connections beyond the limit that get a 503; further ones are closed without a response."""
ACCEPTED_AT_ONCE = 32
"""Connections accepted in one iteration of its loop. One beyond the limit is closed four
iterations later."""
_OWN_FILES = 64
"""Open files that the API process needs for itself."""
RESERVED_FILES = 4 * ACCEPTED_AT_ONCE + MAX_REFUSALS + _OWN_FILES
_MOST_CONNECTIONS = 4096

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Limits:
    """``connections`` is a count, the others are seconds."""

    connections: int
    header_timeout: float
    write_timeout: float
    refusals: Rarely = field(default_factory=lambda: Rarely(log))

    @classmethod
    def of(cls, config: ServerConfig) -> Limits:
        """Raises ConfigError when the process may not open enough files for the connections."""
        return cls(
            connections=_max_connections(config.max_connections),
            header_timeout=config.header_timeout_seconds,
            write_timeout=config.write_timeout_seconds,
        )


def _max_connections(configured: int | None) -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = _MOST_CONNECTIONS + RESERVED_FILES if files == resource.RLIM_INFINITY else files
    room -= RESERVED_FILES
    if room < (configured or 1):
        value = "null" if configured is None else configured
        raise ConfigError(
            f"server.max_connections={value}: this process may open {files} files "
            f"and reserves {RESERVED_FILES}; "
            + (f"set {room} at most, or " if room > 0 else "")
            + f"raise the limit: ulimit -n {(configured or _MOST_CONNECTIONS) + RESERVED_FILES}"
        )
    return min(room, _MOST_CONNECTIONS) if configured is None else configured


class Connection(H11Protocol):
    """The listener calls ``check`` regularly; it enforces every deadline but that of an idle
    connection, which is uvicorn's."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._has_room = True
        self._head_since: float | None = None
        """When the head of a request began to arrive, or the rest of an answered request."""
        self._lingers_since: float | None = None
        self._sent_at = 0.0
        """When bytes last went out, or none had to."""
        self._num_unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=HIGH_WATER)
        self._head_since = self._sent_at = self.loop.time()
        beyond = len(self.connections) - self._limits.connections
        if beyond <= 0:
            return
        self._has_room = False
        self._limits.refusals.warning(
            "all %d connections are in use (server.max_connections): further ones get 503",
            self._limits.connections,
        )
        if beyond > MAX_REFUSALS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._lingers_since is not None:
            return
        if not self._has_room:
            self._refuse(_too_many(self._limits.connections))
            return
        super().data_received(data)
        if self._is_answering:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = self.loop.time()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        rest, _ = self.conn.trailing_data
        is_waiting = rest and not self._is_answering
        self._head_since = self.loop.time() if is_waiting else None

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this while it handles h11's error, which says more than ``msg``."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        message = f"this is not a valid HTTP request: {error or msg}"[:200]
        code = "head_too_large" if status == 431 else "invalid_http"
        self._refuse(RequestError(message, code=code, status=status))

    def shutdown(self) -> None:
        if self._lingers_since is None and self._has_room:
            super().shutdown()
        else:
            self.transport.close()

    def check(self, now: float) -> None:
        """Close the connection if it missed a deadline. ``now``: the loop's time."""
        num_unsent = self.transport.get_write_buffer_size()
        is_fed = self._is_answering and not self.flow.write_paused
        if not num_unsent or num_unsent < self._num_unsent or is_fed:
            self._sent_at = now
        self._num_unsent = num_unsent
        if now - self._sent_at > self._limits.write_timeout:
            self.transport.abort()
        elif self._is_answering or self.transport.is_closing() or num_unsent:
            pass
        elif self._lingers_since is not None:
            if now - self._lingers_since > _LINGER_SECONDS:
                self.transport.close()
        elif self._head_since is not None:
            self._check_head(now - self._head_since)

    def _check_head(self, seconds: float) -> None:
        if not self._has_room and seconds > _LINGER_SECONDS:
            self._refuse(_too_many(self._limits.connections))
        elif seconds > self._limits.header_timeout:
            has_begun = bool(self.conn.trailing_data[0])
            late = RequestError("the request arrived too slowly", code="timeout", status=408)
            self._refuse(late if has_begun else None)

    @property
    def _is_answering(self) -> bool:
        """Whether the application is working on a request of this connection."""
        is_refused = self._lingers_since is not None
        return not is_refused and self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: RequestError | None) -> None:
        """Send an error instead of the application, if a response is still possible, and close the
        connection."""
        sent = dict(self.headers) if self._is_answering else {}
        if self._is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if error is None or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = openai_error(error)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (request_id.HEADER, request_id.request_id(sent)),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if (seconds := retry_after(error)) is not None:
            headers.append((b"retry-after", str(seconds).encode()))
        reason = HTTPStatus(error.status).phrase
        head = h11.Response(status_code=error.status, headers=headers, reason=reason)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._lingers_since = self.loop.time()
        if self.transport.can_write_eof():  # TLS has no half-closed connection
            self.transport.write_eof()


def _too_many(limit: int) -> RequestError:
    return RequestError(
        f"all {limit} connections of this server are in use",
        code="too_many_connections",
        status=503,
    )
