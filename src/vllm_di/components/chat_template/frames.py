"""What goes through the pipes between the API process and the processes that render: msgpack with
its length before it."""

from __future__ import annotations

import struct
from typing import Any

import msgspec

LENGTH = struct.Struct(">I")


class Setup(msgspec.Struct):
    """The first frame to a new process."""

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
    """To a Setup or a Job: a text, or why there is none."""

    text: str = ""
    refusal: str | None = None
    """What the template itself raised (``raise_exception``)."""
    error: str | None = None


def frame(message: Setup | Job | Answer) -> bytes:
    """Raises TypeError, OverflowError, UnicodeEncodeError or RecursionError for values that no
    frame can hold."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body
