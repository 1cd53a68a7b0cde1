"""Both ends of a TCP connection prove that they know a key, before anything else is said.

A key is made of an engine's session, random bytes of each start, and of a secret file, which never
leaves its host. Each end answers the other's challenge by HMAC-SHA256.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import stat
from pathlib import Path

from vllm_di.errors import ConfigError

NONCE = 32
"""Bytes of a challenge, and of its answer by SHA-256."""
SECRET_BYTES = 32


def make_key(session: bytes, secret: bytes) -> bytes:
    """``secret``: the contents of the secret file, or nothing."""
    return hashlib.sha256(session + secret).digest()


def prove(sock: socket.socket, key: bytes, ours: bytes, theirs: bytes) -> None:
    """Prove that we know the key, and that the other end does. ``ours``, ``theirs``: what each end
    is, so that no answer is of use to the other. Raises PermissionError, or OSError when the other
    end hangs up."""
    mine = secrets.token_bytes(NONCE)
    sock.sendall(mine)
    challenge = bytes(exactly(sock, NONCE))
    sock.sendall(_answer(key, ours, challenge))
    if not hmac.compare_digest(bytes(exactly(sock, NONCE)), _answer(key, theirs, mine)):
        raise PermissionError("the other end does not know this engine's key")


def _answer(key: bytes, side: bytes, challenge: bytes) -> bytes:
    return hmac.digest(key, side + challenge, "sha256")


def exactly(sock: socket.socket, size: int) -> bytearray:
    """Raises ConnectionError when the other end closes before."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = sock.recv_into(view[done:])
        if not count:
            raise ConnectionError("the connection was closed")
        done += count
    return data


def address_family(bind: str, secret_file: str | None) -> socket.AddressFamily:
    """Of an address to listen on. Raises ConfigError for what is no address of one interface, and
    for one beyond loopback without a secret file."""
    try:
        address = ipaddress.ip_address(bind)
    except ValueError:
        raise ConfigError(f"bind: {bind!r} is no IP address, such as 127.0.0.1") from None
    if address.is_unspecified:
        raise ConfigError(
            f"bind={bind} listens everywhere, and no peer could connect to it; name the "
            "address of one network interface"
        )
    if not address.is_loopback and secret_file is None:
        raise ConfigError(
            f"bind={bind} can be reached from other machines: set secret_file too, or take "
            "bind=127.0.0.1"
        )
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def read_secret(path: Path) -> bytes:
    """Raises ConfigError for a file that is absent, short or readable by others."""
    try:
        mode, secret = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise ConfigError(f"secret_file: {path}: {os.strerror(error.errno or 0)}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"secret_file: {path} is open to others; chmod 600 {path}")
    if len(secret) < SECRET_BYTES:
        raise ConfigError(
            f"secret_file: {path} has {len(secret)} bytes, and needs {SECRET_BYTES} at least"
        )
    return secret
