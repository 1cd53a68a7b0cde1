"""Lines between an engine and its workers on other hosts: TCP connections that carry the same
frames as the Unix sockets of one host do.

The engine listens, at one port for each worker and until that worker's connections are there;
workers connect. Both ends prove that they know the key (``proof.py``); with certificates the whole
goes over TLS, of which each end shows its own.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path

import msgspec

from vllm_di.components import proof
from vllm_di.errors import ConfigError, one_line

HANDSHAKE_SECONDS = 5.0
"""For a peer to show its certificate and to prove that it knows the key."""
ENGINE, WORKER = b"engine", b"worker"

log = logging.getLogger(__name__)


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Paths of PEM files, of this host's on each host."""

    certificate: str
    """Of this host, with those between it and the authority's."""
    key: str
    authority: str
    """Whose certificates are taken, of peers; nobody else's are."""

    def context(self, *, engine: bool) -> ssl.SSLContext:
        """TLS 1.3 for one end. Raises ConfigError for files that are none."""
        side = ssl.PROTOCOL_TLS_SERVER if engine else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # hosts are told apart by nothing: the authority is ours
        context.verify_mode = ssl.CERT_REQUIRED
        if engine:
            context.num_tickets = 0  # a worker takes bytes on its heartbeat for the engine's end
        for name, path in (("certificate", self.certificate), ("key", self.key)):
            if not Path(path).is_file():
                raise ConfigError(f"cluster.tls.{name}: there is no file {path}", key="cluster.tls")
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.authority)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"cluster.tls: {self.certificate}, {self.key}, {self.authority}: {one_line(error)}",
                key="cluster.tls",
            ) from None
        return context


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker needs to reach its engine, as plain data."""

    address: str
    port: int
    session: bytes
    """Random bytes of this start of the engine."""
    secret_file: str | None = None
    """Path on the worker's host: its contents do not cross."""
    tls: Tls | None = None

    def connect(self) -> socket.socket:
        """A connection that is proven. Raises ConfigError for a secret or a certificate that does
        not fit, OSError when the engine cannot be reached."""
        key = proof.make_key(self.session, _secret(self.secret_file))
        sock = socket.create_connection((self.address, self.port), HANDSHAKE_SECONDS)
        try:
            if self.tls is not None:
                sock = self.tls.context(engine=False).wrap_socket(sock)
            proof.prove(sock, key, WORKER, ENGINE)
            _settle(sock)
        except PermissionError as error:
            sock.close()
            raise ConfigError(_other_secret(self.secret_file, error), key=_SECRET) from None
        except ssl.SSLError as error:
            sock.close()
            raise ConfigError(f"cluster.tls: {one_line(error)}", key="cluster.tls") from None
        except BaseException:
            sock.close()
            raise
        return sock


class LineListener:
    """Where one worker connects to its engine: ``transport.Rendezvous`` beyond one host."""

    def __init__(
        self, bind: str, session: bytes, *, secret_file: str | None = None, tls: Tls | None = None
    ) -> None:
        """Listens at a free port of the address ``bind``. Raises ConfigError."""
        family = proof.address_family(bind, secret_file)
        self._key = proof.make_key(session, _secret(secret_file))
        self._context = None if tls is None else tls.context(engine=True)
        try:
            self.socket = socket.create_server((bind, 0), family=family)
        except OSError as error:
            raise ConfigError(
                f"cluster.bind: {bind}: {error.strerror}; name an address of this host",
                key="cluster.bind",
            ) from None
        self.line = Line(
            address=bind,
            port=self.socket.getsockname()[1],
            session=session,
            secret_file=secret_file,
            tls=tls,
        )
        self.refused: str | None = None
        """Why the last connection was not taken."""

    def accept(self) -> socket.socket | None:
        """The next connection, proven; None for one that is not the worker's."""
        sock, (host, *_) = self.socket.accept()
        sock.settimeout(HANDSHAKE_SECONDS)
        try:
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True)
            proof.prove(sock, self._key, ENGINE, WORKER)
            _settle(sock)
        except OSError as error:  # PermissionError and ssl.SSLError are such
            sock.close()
            self.refused = f"a connection from {host} was refused: {error}"
            log.warning("%s", self.refused)
            return None
        return sock

    def close(self) -> None:
        self.socket.close()


def descriptor(sock: socket.socket) -> int:
    """The file descriptor of a connection, for whoever takes none but plain sockets. TLS is left in
    this process: two threads pass the bytes on."""
    if not isinstance(sock, ssl.SSLSocket):
        return sock.detach()
    ours, theirs = socket.socketpair()
    for source, target in ((ours, sock), (sock, ours)):
        threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()
    return theirs.detach()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
    source.close()


_SECRET = "cluster.secret_file"


def _secret(path: str | None) -> bytes:
    if path is None:
        return b""
    try:
        return proof.read_secret(Path(path))
    except ConfigError as error:
        raise ConfigError(f"cluster.{error}", key=_SECRET) from None


def _other_secret(path: str | None, error: Exception) -> str:
    file = f"{path} holds another secret than the engine's" if path else "none is given"
    return f"cluster.secret_file: {file}, or another program listens in its place ({error})"


def _settle(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(None)
