"""Sockets, signals and the end of the process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from vllm_di.errors import ConfigError
from vllm_di.server.config import ServerConfig

_CLOSING_SECONDS = 5
"""For connections to take their last bytes."""

log = logging.getLogger(__name__)


class Listener(uvicorn.Server):
    """uvicorn in our own event loop; signals are ours."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                ws="none",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=config.idle_connection_seconds,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would take SIGTERM and raise it again at the end."""
        yield


def open_socket(config: ServerConfig) -> tuple[socket.socket, str]:
    """A bound socket, and its address for people. Raises ConfigError."""
    if config.unix_socket:
        return _open_unix_socket(config.unix_socket), f"unix:{config.unix_socket}"
    try:
        infos = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = infos[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"server.host={config.host}, server.port={config.port}: cannot listen there: "
            f"{error.strerror or error}; choose another with server.port=PORT (0 for a free one)"
        ) from None
    host = f"[{config.host}]" if ":" in config.host else config.host
    return bound, f"http://{host}:{bound.getsockname()[1]}"


def _open_unix_socket(path: str) -> socket.socket:
    """Only this user may connect. A socket left behind by a dead process is replaced."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError(f"server.unix_socket={path}: something that is no socket is there")
        os.unlink(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        bound.bind(path)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"server.unix_socket={path}: cannot listen there: {error.strerror or error}"
        ) from None
    finally:
        os.umask(before)
    return bound


def remove_unix_socket(path: str | None) -> None:
    """At the end."""
    if path:
        Path(path).unlink(missing_ok=True)


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
