"""The messages between the API process and the render processes: MessagePack, each preceded by its
length."""

from __future__ import annotations

import struct
from typing import Any

import msgspec

LENGTH = struct.Struct(">I")


class Setup(msgspec.Struct):
    """The first message to a new process."""

    sources: dict[str, str]
    """Name to Jinja source."""
    cpu_seconds: float
    memory_bytes: int
    max_chars: int


class Job(msgspec.Struct):
    """One prompt to render."""

    name: str
    values: dict[str, Any]
    now: float
    """The server's clock, in seconds since the epoch."""


class Answer(msgspec.Struct, omit_defaults=True):
    """The answer to a Setup or a Job: the text, or why there is none."""

    text: str = ""
    refusal: str | None = None
    """The message with which the template called ``raise_exception``."""
    error: str | None = None


def frame(message: Setup | Job | Answer) -> bytes:
    """Encode a message. Raises TypeError, OverflowError, UnicodeEncodeError or RecursionError for
    values that MessagePack cannot encode."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body
