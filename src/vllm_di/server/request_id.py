"""The id of an HTTP request: the client's ``X-Request-Id``, or one that is made here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vllm_di.server.service import new_id

HEADER = b"x-request-id"
_SAFE = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def request_id(headers: Mapping[bytes, bytes]) -> bytes:
    """The client's where it is short and of harmless characters. It goes into logs, traces and the
    answer's header, and nothing is found by it: two clients may send the same."""
    given = headers.get(HEADER, b"")
    return given if _SAFE.fullmatch(given) else new_id("req").encode()
