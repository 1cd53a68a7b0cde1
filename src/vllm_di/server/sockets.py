"""Listening sockets: a TCP port, or the path of a Unix socket."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_di.errors import ConfigError

BACKLOG = 1024
"""Connections that the kernel keeps until they are accepted."""

_LOCK_SECONDS = 5.0
_PORTS_TO_TRY = 20


class Listening:
    """A socket that already listens, so that nobody else can take its address."""

    def __init__(self, bound: socket.socket, address: str, path: str | None = None) -> None:
        self.socket = bound
        self.address = address
        """For people: ``http://HOST:PORT`` or ``unix:PATH``."""
        self._path = path
        self._file = _identity(path) if path else None

    def close(self) -> None:
        """Remove the socket's file if it is still the one that was made here, and close it."""
        if self._path is not None:
            with suppress(OSError, ConfigError), _folder_locked(self._path):
                if _identity(self._path) == self._file:
                    os.unlink(self._path)
        self.socket.close()


def listen(host: str, port: int, unix_socket: str | None) -> Listening:
    """Take the address. Raises ConfigError that names the key and a remedy."""
    if unix_socket:
        return Listening(_listen_unix(unix_socket), f"unix:{unix_socket}", unix_socket)
    bound = _listen_tcp(host, port)
    name = f"[{host}]" if ":" in host else host
    return Listening(bound, f"http://{name}:{bound.getsockname()[1]}")


def check_address(host: str, port: int, unix_socket: str | None) -> None:
    """Raise the ConfigError of ``listen`` for an address that is taken, and leave it free."""
    if unix_socket is None:
        _listen_tcp(host, port).close()
        return
    with _folder_locked(unix_socket):
        _check_unix(unix_socket)


# -- TCP ------------------------------------------------------------------------------------------


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        return _open(host, port)
    except socket.gaierror as error:
        raise ConfigError(
            f"server.host={host}: {error.strerror or error}; expected an address of this machine, "
            "such as 127.0.0.1"
        ) from None
    except OSError as error:
        raise ConfigError(_refusal(host, port, error)) from None


def _open(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # two sockets may be bound to a port while neither listens
    except BaseException:
        bound.close()
        raise
    return bound


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        free = next((p for p in range(port + 1, port + _PORTS_TO_TRY) if _is_free(host, p)), 0)
        nearest = f"server.port={free} is free, " if free else ""
        return (
            f"server.port={port}: something listens on {host}:{port} already; {nearest}"
            "server.port=0 takes any"
        )
    if error.errno == errno.EACCES:
        return (
            f"server.port={port}: this user may not listen there: ports below 1024 need a "
            "privilege; take server.port=8080, say"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"server.host={host}: this machine has no such address; take 127.0.0.1 for this "
            "machine alone, 0.0.0.0 for all its addresses"
        )
    return f"server.host={host}, server.port={port}: cannot listen there: {error.strerror or error}"


def _is_free(host: str, port: int) -> bool:
    try:
        _open(host, port).close()
    except (OSError, OverflowError):
        return False
    return True


# -- Unix -----------------------------------------------------------------------------------------


def _listen_unix(path: str) -> socket.socket:
    """Only this user may connect."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with _folder_locked(path):
            if _check_unix(path):
                os.unlink(path)
            bound.bind(path)
            bound.listen(BACKLOG)
    except BaseException as error:
        bound.close()
        if isinstance(error, OSError):
            raise ConfigError(_cannot(path, error)) from None
        raise
    finally:
        os.umask(before)
    return bound


def _check_unix(path: str) -> bool:
    """Whether a socket without a server lies there. Raises ConfigError for anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(_cannot(path, error)) from None
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"server.unix_socket={path}: something that is no socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)  # a server whose backlog is full is living too
        try:
            client.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return os.path.lexists(path)
        except BlockingIOError:
            pass
        except OSError as error:
            raise ConfigError(_cannot(path, error)) from None
    raise ConfigError(
        f"server.unix_socket={path}: another server listens there; stop it, or choose another path"
    )


def _cannot(path: str, error: OSError) -> str:
    return f"server.unix_socket={path}: cannot listen there: {error.strerror or error}"


@contextmanager
def _folder_locked(path: str) -> Iterator[None]:
    """Two servers that find the same dead socket must not both replace it. The lock is on the
    folder, so that no file is left behind."""
    try:
        folder = os.open(Path(path).absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(_cannot(path, error)) from None
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ConfigError(
                        f"server.unix_socket={path}: another process holds a lock on its folder; "
                        "choose a folder of your own"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(folder)


def _identity(path: str) -> tuple[int, int] | None:
    """Tells a file from another of the same name."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
