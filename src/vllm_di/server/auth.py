"""API keys. Only hashes are kept, and all of them are compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from vllm_di.errors import ConfigError

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/ping"})
"""Paths that need no key. Every other one does, whether it exists or not."""


class ApiKeys:
    """The keys that the server takes; without any, it is open."""

    def __init__(self, *, file: str | None = None, env: str | None = None) -> None:
        keys = (_from_file(file) if file else []) + (_from_env(env) if env else [])
        self._hashes = [_hash(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def allow(self, path: str, authorization: bytes | None) -> bool:
        """Whether a request may pass. ``path`` is the very path that routing sees."""
        if not self._hashes or path in OPEN_PATHS:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        given = _hash(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        return any(matches) and scheme.lower() == b"bearer"


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _from_file(path: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_key_file={path}: it cannot be read: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"server.api_key_file={path}: there is no key in it, one a line")
    return keys


def _from_env(name: str) -> list[str]:
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(f"server.api_key_env={name}: this environment variable is empty")
    return [key]
