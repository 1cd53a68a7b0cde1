"""Bytes over TCP sockets: between workers that share no memory.

Both ends prove that they know the key, which is made of the engine's session and of the secret
file, before a byte of the cache moves; with certificates the whole goes over TLS. What a taker may
say is one ticket's number at a time.
"""

from __future__ import annotations

import itertools
import logging
import socket
import ssl
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import msgspec

from vllm_di.components.interfaces import KvTransfer
from vllm_di.components.lines import Tls
from vllm_di.components.proof import address_family, exactly, make_key, prove, read_secret
from vllm_di.errors import ConfigError, EngineDeadError, PortError

NUMBER = struct.Struct("<Q")
"""A ticket's number, and the size of its answer."""
UNKNOWN = 2**64 - 1
"""In place of a size: no such offer."""
MOST_UNPROVEN = 64
"""Connections at once whose other end has yet to prove that it knows the key: each is a thread."""

log = logging.getLogger(__name__)


class TcpTransfer(KvTransfer):
    """Every worker listens at a free port of ``bind`` once it has something to offer; a taker keeps
    its connection. ``bind=None``: the loopback, or the address of the host where a cluster has
    placed the worker. Raises ConfigError for an address beyond loopback without a secret file."""

    def __init__(
        self,
        *,
        bind: str | None,
        secret_file: str | None,
        tls: Tls | None,
        timeout: Annotated[float, msgspec.Meta(gt=0)],
    ) -> None:
        self._secret_file, self._tls, self._timeout = secret_file, tls, timeout
        self._is_fixed = bind is not None
        self._bind = bind or "127.0.0.1"
        self._family = address_family(self._bind, secret_file)
        self._secret = b"" if secret_file is None else read_secret(Path(secret_file))
        self._key = b""
        self._numbers = itertools.count(1)
        self._offers: dict[int, bytearray] = {}
        self._listener: socket.socket | None = None
        self._is_closed = False
        self._connections: dict[tuple[str, int], socket.socket] = {}
        self._served: set[socket.socket] = set()
        self._unproven = threading.BoundedSemaphore(MOST_UNPROVEN)

    def check(self) -> None:
        if self._tls is not None:
            self._tls.context(engine=True)

    def check_hosts(self, addresses: Sequence[str]) -> None:
        if self._is_fixed and len({*addresses}) > 1:
            raise ConfigError(
                f"kv_transfer.bind={self._bind}: the workers are on several hosts "
                f"({', '.join(sorted({*addresses}))}), each with an address of its own; set it to "
                "null"
            )
        for address in addresses if not self._is_fixed else ():
            try:
                address_family(address, self._secret_file)
            except ConfigError:
                raise ConfigError(
                    f"kv_transfer.secret_file: a worker at {address} can be reached from other "
                    "machines: set it, or cluster.secret_file"
                ) from None

    def settle(self, address: str) -> None:
        if not self._is_fixed:
            self._bind, self._family = address, address_family(address, self._secret_file)

    def open(self, session: bytes) -> None:
        self._key = make_key(session, self._secret)

    def offer(self, size: int) -> tuple[str, memoryview]:
        if self._listener is None:
            self._listener = socket.create_server((self._bind, 0), family=self._family)
            thread = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
            thread.start()
        number, memory = next(self._numbers), bytearray(size)
        self._offers[number] = memory
        host, port = self._listener.getsockname()[:2]
        return f"{host} {port} {number} {size}", memoryview(memory)

    @contextmanager
    def take(self, ticket: str) -> Iterator[memoryview]:
        host, port, number, size = _read(ticket)
        try:
            sock = self._connected(host, port)
            sock.sendall(NUMBER.pack(number))
            [there] = NUMBER.unpack(exactly(sock, NUMBER.size))
            if there != size:
                raise ConnectionError("the offer is not there any more")
            data = exactly(sock, size)
        except OSError as error:
            if (broken := self._connections.pop((host, port), None)) is not None:
                broken.close()
            raise EngineDeadError(f"the cache offered at {host}:{port}: {error}") from None
        yield memoryview(data)

    def withdraw(self, ticket: str) -> None:
        self._offers.pop(_read(ticket)[2], None)

    def close(self) -> None:
        self._is_closed = True
        served = list(self._served)  # their threads take themselves out
        for sock in filter(None, [self._listener, *self._connections.values(), *served]):
            with suppress(OSError):  # wakes the thread that waits for it
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    # -- the side that offers -----------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if not self._is_closed:
                    log.error("no further worker can take the KV cache from this one: %s", error)
                return
            if self._unproven.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()
            else:
                log.warning("a connection for the KV cache was refused: too many are not proven")
                sock.close()

    def _serve(self, sock: socket.socket) -> None:
        """Answer one taker's tickets until it hangs up."""
        try:
            try:
                sock.settimeout(self._timeout)
                if self._tls is not None:
                    sock = self._tls.context(engine=True).wrap_socket(sock, server_side=True)
                self._served.add(sock)
                self._prove(sock, b"offers", b"takes")
            finally:
                self._unproven.release()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                sock.settimeout(None)  # between two tickets any time may pass
                [number] = NUMBER.unpack(exactly(sock, NUMBER.size))
                sock.settimeout(self._timeout)
                memory = self._offers.get(number)
                if memory is None:
                    sock.sendall(NUMBER.pack(UNKNOWN))
                    continue
                sock.sendall(NUMBER.pack(len(memory)))
                sock.sendall(memory)
        except (PermissionError, ssl.SSLError) as error:
            log.warning("a connection for the KV cache was refused: %s", error)
        except OSError:
            pass  # it hung up
        finally:
            self._served.discard(sock)
            sock.close()

    # -- both ---------------------------------------------------------------------------------

    def _connected(self, host: str, port: int) -> socket.socket:
        sock = self._connections.get((host, port))
        if sock is None:
            sock = socket.create_connection((host, port), self._timeout)
            try:
                if self._tls is not None:
                    sock = self._tls.context(engine=False).wrap_socket(sock)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._prove(sock, b"takes", b"offers")
            except BaseException:
                sock.close()
                raise
            self._connections[host, port] = sock
        return sock

    def _prove(self, sock: socket.socket, ours: bytes, theirs: bytes) -> None:
        """Prove that we know the key, and that the other end does. Raises PermissionError."""
        if not self._key:
            raise PermissionError("this end was not opened")
        prove(sock, self._key, ours, theirs)


def _read(ticket: str) -> tuple[str, int, int, int]:
    host, *rest = ticket.split(" ")
    if len(rest) != 3 or not all(part.isdecimal() for part in rest):
        raise PortError(f"{ticket!r} is no ticket of kv_transfer=tcp")
    port, number, size = map(int, rest)
    return host, port, number, size
