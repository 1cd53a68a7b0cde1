"""What has been made of a request's texts and its writer has not yet taken."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from vllm_di.components.messages import TokenLogprobs
from vllm_di.frontend.processor import Update

_MAX_SEPARATE = 64
"""Updates that wait as they came; after that a text's further ones are added to its last."""

# What CPython takes, about.
_UPDATE_BYTES = 300
_TOKEN_BYTES = 40
_LOGPROBS_BYTES = 250
_ALTERNATIVE_BYTES = 72


class Updates:
    """A queue between the tasks of a run and its writer. It stays short: what waits for a slow
    reader is merged, so that only texts, ids and log-probabilities grow, and ``num_bytes`` says how
    much that is."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._last: dict[tuple[int, int], _Waiting] = {}
        self._error: Exception | None = None
        self._has_more = asyncio.Event()
        self.num_bytes = 0

    @property
    def is_empty(self) -> bool:
        return not self._waiting and self._error is None

    def put(self, position: int, update: Update) -> None:
        """Add an update of the generation at ``position``."""
        size = _num_bytes(update)
        self.num_bytes += size
        last = self._last.get((position, update.index))
        if last is not None and len(self._waiting) >= _MAX_SEPARATE:
            last.add(update, size)
        else:
            last = self._last[position, update.index] = _Waiting(position, update, size)
            self._waiting.append(last)
        self._has_more.set()

    def end(self, error: Exception, *, at_once: bool = True) -> None:
        """Make ``get`` raise ``error``: at once, or after the updates that wait."""
        if at_once:
            self._waiting.clear()
            self._last.clear()
            self.num_bytes = 0
        if at_once or self._error is None:
            self._error = error
        self._has_more.set()

    async def get(self) -> tuple[int, Update]:
        """The next update and its position. Raises the error that ended them."""
        while self.is_empty:
            self._has_more.clear()
            await self._has_more.wait()
        if not self._waiting:
            assert self._error is not None
            raise self._error
        first = self._waiting.popleft()
        key = first.position, first.update.index
        if self._last.get(key) is first:
            del self._last[key]
        self.num_bytes -= first.size
        return first.position, first.update


@dataclass(slots=True)
class _Waiting:
    position: int
    update: Update
    size: int

    def add(self, update: Update, size: int) -> None:
        mine = self.update
        mine.text += update.text
        mine.token_ids = mine.token_ids + update.token_ids
        if update.logprobs is not None:
            mine.logprobs = [*(mine.logprobs or ()), *update.logprobs]
        mine.finish_reason, mine.stop_reason = update.finish_reason, update.stop_reason
        mine.abort = update.abort
        self.size += size


def _num_bytes(update: Update) -> int:
    size = _UPDATE_BYTES + len(update.text) + _TOKEN_BYTES * len(update.token_ids)
    entries: list[TokenLogprobs] = update.logprobs or []
    return size + sum(_LOGPROBS_BYTES + _ALTERNATIVE_BYTES * len(e.token_ids) for e in entries)
