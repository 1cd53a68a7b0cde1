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
from vllm_di.server.gate import MAX_HEAD_BYTES
from vllm_di.server.rarely import Rarely
from vllm_di.server.sockets import BACKLOG

_CLOSING_SECONDS = 5
"""For connections to take their last bytes."""
_TICKS_BETWEEN_CHECKS = 5
"""uvicorn ticks ten times a second."""
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

log = logging.getLogger(__name__)


class Listener(uvicorn.Server):
    """uvicorn with our connections, whose deadlines it checks twice a second."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        limits = Limits.of(config)
        connection: Any = functools.partial(Connection, limits=limits)
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                log_config=None,
                log_level="error",  # warnings are about what clients sent
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
        """uvicorn would take SIGTERM and raise it again at the end."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():  # asyncio takes one number for both of its backlogs
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
    """asyncio logs a traceback for each connection that it cannot accept for want of open files;
    here that is one line a minute."""
    loop = asyncio.get_running_loop()
    line = Rarely(log)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
            line.warning("connections have to wait: %s", error.strerror)
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
    """Call ``on_signal`` for each SIGTERM or SIGINT. Outside the main thread, where no signals
    arrive, do nothing."""
    loop = asyncio.get_running_loop()
    taken: list[signal.Signals] = []
    with suppress(ValueError, RuntimeError):
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
            taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
