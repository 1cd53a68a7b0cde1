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
"""Connections that the kernel queues until they are accepted."""

_LOCK_SECONDS = 5.0
_PORTS_TO_TRY = 20


class Listening:
    """A socket that listens already, so that no other process can take its address."""

    def __init__(self, bound: socket.socket, address: str, path: str | None = None) -> None:
        self.socket = bound
        self.address = address
        """For people: ``http://HOST:PORT``, ``https://HOST:PORT`` or ``unix:PATH``."""
        self._path = path
        self._file = _identity(path) if path else None

    def close(self) -> None:
        """Close the socket, and remove its file if it is still the one that was created here."""
        if self._path is not None:
            with suppress(OSError, ConfigError), _folder_locked(self._path):
                if _identity(self._path) == self._file:
                    os.unlink(self._path)
        self.socket.close()


def listen(host: str, port: int, unix_socket: str | None, scheme: str = "http") -> Listening:
    """Bind the address and listen. Raises ConfigError with the key and what to set instead."""
    if unix_socket:
        return Listening(_listen_unix(unix_socket), f"unix:{unix_socket}", unix_socket)
    bound = _listen_tcp(host, port)
    name = f"[{host}]" if ":" in host else host
    return Listening(bound, f"{scheme}://{name}:{bound.getsockname()[1]}")


def check_address(host: str, port: int, unix_socket: str | None) -> None:
    """Raise the ConfigError that ``listen`` would raise, without keeping the address."""
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
        bound.listen(BACKLOG)  # binding alone does not reserve the port
    except BaseException:
        bound.close()
        raise
    return bound


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        free = next((p for p in range(port + 1, port + _PORTS_TO_TRY) if _is_free(host, p)), 0)
        nearest = f"server.port={free} is free, " if free else ""
        return (
            f"server.port={port}: another process listens on {host}:{port} already; {nearest}"
            "server.port=0 picks a free one"
        )
    if error.errno == errno.EACCES:
        return (
            f"server.port={port}: this user may not listen there: ports below 1024 need a "
            "privilege; use, for example, server.port=8080"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"server.host={host}: this machine has no such address; use 127.0.0.1 for this "
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
    """A socket to which only this user may connect."""
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
    """Whether the path is a socket that no server listens on. Raises ConfigError if it is in
    use, or something else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(_cannot(path, error)) from None
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"server.unix_socket={path}: this path exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)  # if the backlog is full, the server runs too
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
    """Hold a lock, so that two servers do not both replace the same unused socket. It is on the
    folder: a lock file would be left behind."""
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
    """Device and inode: equal for the same file, not for a new one of the same name."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
