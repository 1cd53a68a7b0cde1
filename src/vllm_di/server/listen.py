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
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from vllm_di.server.config import ServerConfig
from vllm_di.server.connection import ACCEPTED_AT_ONCE, Connection, Limits
from vllm_di.server.middleware import MAX_HEAD_BYTES
from vllm_di.server.rarely import Rarely
from vllm_di.server.sockets import BACKLOG

_CLOSING_SECONDS = 5
"""Time for clients to read their last bytes."""
_TICKS_BETWEEN_CHECKS = 5
"""uvicorn ticks ten times a second."""
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

log = logging.getLogger(__name__)


class Listener(uvicorn.Server):
    """uvicorn with ``Connection``; checks the deadlines of all connections twice a second."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        limits = Limits.of(config)
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
        await super().startup(sockets)
        # asyncio uses one number for the kernel's backlog and for how many it accepts at once
        for listening in sockets or ():
            listening.listen(BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_BETWEEN_CHECKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                assert isinstance(connection, Connection)
                connection.check(now)
        return await super().on_tick(counter)


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
