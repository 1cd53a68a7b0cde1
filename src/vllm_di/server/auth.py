"""API keys. Only their hashes are kept; each is compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from vllm_di.errors import ConfigError

PAGE_PATHS = frozenset({"/", "/page.css", "/page.js"})
"""The files of the page, which asks for a key itself. They hold nothing of this server."""
OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/ping"}) | PAGE_PATHS
"""Paths that need no key. All others do, even those that do not exist."""
OWNER = "vllm_di.owner"
"""Key of the ASGI scope: what ``ApiKeys.owner`` gave for the request."""


class ApiKeys:
    """The keys that the server accepts. Without keys, every request passes."""

    def __init__(self, *, file: str | None = None, env: str | None = None) -> None:
        keys = (_from_file(file) if file else []) + (_from_env(env) if env else [])
        self._hashes = [_hash(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def owner(self, path: str, headers: Mapping[bytes, bytes]) -> bytes | None:
        """The hash of the key that a request brings, empty where it needs none; None refuses it.
        ``path`` must be the one that routing sees. A key comes as OpenAI's clients send it, or as
        Anthropic's do (``x-api-key``)."""
        if not self._hashes or path in OPEN_PATHS:
            return b""
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        keys = [bearer] if scheme.lower() == b"bearer" else []
        if (key := headers.get(b"x-api-key")) is not None:
            keys.append(key)
        digests = [_hash(key.strip()) for key in keys]
        pairs = [(d, hmac.compare_digest(d, known)) for d in digests for known in self._hashes]
        return next((digest for digest, matches in pairs if matches), None)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _from_file(path: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_key_file={path}: the file cannot be read: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(
            f"server.api_key_file={path}: there is no key in it; expected one key on each line"
        )
    return keys


def _from_env(name: str) -> list[str]:
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(
            f"server.api_key_env={name}: this environment variable is empty or not set"
        )
    return [key]
