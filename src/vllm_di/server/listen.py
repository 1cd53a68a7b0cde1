"""uvicorn in our own event loop, and signals."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from vllm_di.server.config import ServerConfig
from vllm_di.server.connection import ACCEPTED_AT_ONCE, MAX_REFUSALS, Connection, Limits
from vllm_di.server.middleware import MAX_HEAD_BYTES
from vllm_di.server.rarely import Rarely
from vllm_di.server.sockets import BACKLOG
from vllm_di.server.tls import Tls
from vllm_di.server.tls_accept import TlsAcceptor

_CLOSING_SECONDS = 5
"""Time for clients to read their last bytes."""
_TICKS_BETWEEN_CHECKS = 5
"""uvicorn ticks ten times a second."""
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

log = logging.getLogger(__name__)


class Listener(uvicorn.Server):
    """uvicorn with ``Connection``; checks the deadlines of all connections twice a second. With
    ``tls`` it speaks HTTPS."""

    def __init__(self, app: ASGIApp, config: ServerConfig, tls: Tls | None = None) -> None:
        limits = self._limits = Limits.of(config)
        self._tls, self._refresh_at = tls, 0.0
        connection: Any = functools.partial(Connection, limits=limits)
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                log_config=None,
                log_level="error",  # its warnings are about what clients send
                access_log=False,
                ws="none",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                backlog=ACCEPTED_AT_ONCE,
                timeout_keep_alive=config.idle_connection_seconds,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: ``signals`` handles them. uvicorn would raise SIGTERM again at the end."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._tls is not None:
            await self._startup_tls(sockets or [], self._tls)
            return
        await super().startup(sockets)
        # asyncio uses one number for the kernel's backlog and for how many it accepts at once
        for listening in sockets or ():
            listening.listen(BACKLOG)

    async def _startup_tls(self, sockets: list[socket.socket], tls: Tls) -> None:
        """As uvicorn's, with our own acceptors: its servers keep one certificate for ever."""
        config = self.config
        await self.lifespan.startup()

        def make_protocol() -> asyncio.Protocol:
            kind: Any = config.http_protocol_class
            made: asyncio.Protocol = kind(
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return made

        def has_room(num_greeting: int) -> bool:
            count = len(self.server_state.connections) + num_greeting
            return count < self._limits.connections + MAX_REFUSALS

        acceptors = [TlsAcceptor(sock, tls, make_protocol, has_room) for sock in sockets]
        self.servers = cast(list[asyncio.base_events.Server], acceptors)
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        now = asyncio.get_running_loop().time()
        self._refresh(now)
        if counter % _TICKS_BETWEEN_CHECKS == 0:
            for connection in list(self.server_state.connections):
                assert isinstance(connection, Connection)
                connection.check(now)
        return await super().on_tick(counter)

    def _refresh(self, now: float) -> None:
        tls = self._tls
        if tls is None or not tls.reload_seconds or now < self._refresh_at:
            return
        self._refresh_at = now + tls.reload_seconds
        tls.refresh()


@contextmanager
def quiet_accepts() -> Iterator[None]:
    """Log one line a minute while connections cannot be accepted because too many files are open;
    asyncio would log a traceback for each."""
    loop = asyncio.get_running_loop()
    line = Rarely(log)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
            line.warning("new connections wait: %s", error.strerror)
        else:
            loop.default_exception_handler(context)

    before = loop.get_exception_handler()
    loop.set_exception_handler(handle)
    try:
        yield
    finally:
        loop.set_exception_handler(before)


@contextmanager
def signals(on_signal: Callable[[], None]) -> Iterator[None]:
    """Call ``on_signal`` for each SIGTERM or SIGINT. Does nothing outside the main thread, where
    Python delivers no signals."""
    loop = asyncio.get_running_loop()
    handled: list[signal.Signals] = []
    with suppress(ValueError, RuntimeError):
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
            handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
