"""Accepts connections that speak TLS. Each has its handshake apart, under a deadline, and gets the
certificate of that moment."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import socket
from collections.abc import Callable
from contextlib import suppress

from vllm_di.errors import RequestError
from vllm_di.server.connection import ACCEPTED_AT_ONCE
from vllm_di.server.errors import openai_error
from vllm_di.server.rarely import Rarely
from vllm_di.server.request_id import request_id
from vllm_di.server.tls import Tls

_HANDSHAKE = 0x16
"""First byte of a TLS connection: a record that holds a handshake (RFC 8446, 5.1)."""
_SHUTDOWN_SECONDS = 5.0
"""Time for a client to take its last bytes and say goodbye."""
_LINGER_SECONDS = 1.0
_PAUSE_SECONDS = 1.0
"""Until the next try, while no connection can be accepted."""
_CONNECTION_GONE = {errno.ECONNABORTED, errno.EPROTO, errno.EPERM}

log = logging.getLogger(__name__)


class TlsAcceptor:
    """Takes the place of an asyncio.Server, whose certificate could not change."""

    def __init__(
        self,
        listening: socket.socket,
        tls: Tls,
        make_protocol: Callable[[], asyncio.Protocol],
        has_room: Callable[[int], bool],
    ) -> None:
        """``has_room``: whether a connection may come in beside so many in a handshake."""
        listening.setblocking(False)
        self._listening, self._tls = listening, tls
        self._make_protocol, self._has_room = make_protocol, has_room
        self._greeting = set[asyncio.Task[None]]()
        self._out_of_files, self._full = Rarely(log), Rarely(log)
        self._accepting = asyncio.create_task(self._accept())

    def close(self) -> None:
        """Accept nothing more; those in a handshake are let go."""
        for task in (self._accepting, *self._greeting):
            task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(self._accepting, *self._greeting, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        for count in itertools.count(1):
            if count % ACCEPTED_AT_ONCE == 0:  # where one waits already, sock_accept does not yield
                await asyncio.sleep(0)
            try:
                sock, _ = await loop.sock_accept(self._listening)
            except OSError as error:
                if error.errno in _CONNECTION_GONE:
                    continue
                self._out_of_files.warning("new connections wait: %s", error.strerror)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            if not self._has_room(len(self._greeting)):
                self._full.warning("connections are closed at once: too many are open")
                sock.close()
                continue
            task = loop.create_task(self._greet(sock))
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    async def _greet(self, sock: socket.socket) -> None:
        """Hand the connection to a protocol once it speaks TLS."""
        loop, taken = asyncio.get_running_loop(), False
        try:
            async with asyncio.timeout(self._tls.handshake_seconds):
                first = await _first_byte(sock)
                if first[:1] == bytes([_HANDSHAKE]):
                    taken = True  # the transport closes it, whatever comes
                    await loop.connect_accepted_socket(
                        self._make_protocol,
                        sock,
                        ssl=self._tls.context,
                        ssl_handshake_timeout=self._tls.handshake_seconds,
                        ssl_shutdown_timeout=_SHUTDOWN_SECONDS,
                    )
                elif first.isalpha():
                    await _refuse_http(sock)
        except OSError as error:  # TLS errors and time-outs too
            log.debug("a connection did not come to speak TLS: %s", error)
        finally:
            if not taken:
                sock.close()


async def _first_byte(sock: socket.socket) -> bytes:
    """The first byte that comes, which stays in the socket; none at the connection's end."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)
    return sock.recv(1, socket.MSG_PEEK)


async def _refuse_http(sock: socket.socket) -> None:
    """Say in plain HTTP that this is HTTPS. Then read on for a moment: to close while a client
    sends would lose the answer."""
    loop = asyncio.get_running_loop()
    body = openai_error(
        RequestError("this port speaks HTTPS: ask https:// instead of http://", code="use_https")
    )
    head = (
        "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\n"
        f"x-request-id: {request_id({}).decode()}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    await loop.sock_sendall(sock, head.encode() + body)
    sock.shutdown(socket.SHUT_WR)
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while await loop.sock_recv(sock, 65536):
                pass
