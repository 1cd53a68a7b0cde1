"""Keeps responses for clients that ask for them again."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

import orjson

from vllm_di.errors import RequestError

_ENTRY_BYTES = 1_000
"""Approximate memory of CPython objects round the encoded ones."""


@dataclass(slots=True)
class Entry:
    """A response of one key, and the conversation up to its end."""

    response: bytes
    """JSON."""
    messages: bytes
    """JSON of the chat messages, without instructions."""
    task: asyncio.Task[None] | None = None
    """Of one that still runs in the background."""

    @property
    def size(self) -> int:
        return len(self.response) + len(self.messages) + _ENTRY_BYTES


class ResponseStore:
    """At most ``max_bytes`` for each API key; what was used longest ago goes first. One key never
    sees another's: there it is 404."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._of: dict[bytes, OrderedDict[str, Entry]] = {}
        self._sizes = Counter[bytes]()
        """Bytes of each key: they would be thousands of entries to add up for each response."""

    def put(self, owner: bytes, response: dict[str, Any], messages: list[Any]) -> Entry:
        """Keep a response, or replace it. One that alone is too large is not kept."""
        entries = self._of.setdefault(owner, OrderedDict())
        entry, name = Entry(orjson.dumps(response), orjson.dumps(messages)), response["id"]
        if (replaced := entries.pop(name, None)) is not None:
            self._sizes[owner] -= replaced.size
        entries[name] = entry
        self._sizes[owner] += entry.size
        while self._sizes[owner] > self._max_bytes:
            _, oldest = entries.popitem(last=False)
            self._sizes[owner] -= oldest.size
        return entry

    def get(self, owner: bytes, name: str) -> Entry:
        """Raises RequestError (404)."""
        entries = self._of.get(owner, OrderedDict[str, Entry]())
        if name not in entries:
            raise RequestError(
                f"the response {name[:100]!r} is not here: it was not stored, or others took its "
                "place (server.response_store_bytes)",
                code="not_found",
                status=404,
            )
        entries.move_to_end(name)
        return entries[name]

    def delete(self, owner: bytes, name: str) -> None:
        """Raises RequestError (404)."""
        self.get(owner, name)
        self._sizes[owner] -= self._of[owner].pop(name).size
