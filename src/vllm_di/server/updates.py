"""The queue between the tasks that generate and the writer that sends."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from vllm_di.components.messages import TokenLogprobs
from vllm_di.frontend.processor import Update

_MAX_SEPARATE = 64
"""Updates that wait one by one; beyond that, a new update is merged into the last of its choice."""

# Approximate memory of CPython objects.
_UPDATE_BYTES = 300
_TOKEN_BYTES = 40
_LOGPROBS_BYTES = 250
_ALTERNATIVE_BYTES = 72


class Updates:
    """An asynchronous iterator over ``(position, update)``, where ``position`` is that of the
    prompt in its request; None stands for ``patience`` seconds without an update.

    The queue stays short: while the reader is slow, waiting updates of one choice are merged, so
    that only texts, token ids and logprobs grow. ``num_bytes`` estimates their size.
    """

    def __init__(self, patience: float | None = None) -> None:
        self._patience = patience
        self._waiting: deque[_Waiting] = deque()
        self._last: dict[tuple[int, int], _Waiting] = {}
        self._end: Exception | None = None
        self._has_more = asyncio.Event()
        self.num_bytes = 0

    def put(self, position: int, update: Update) -> None:
        """Add an update of the prompt at ``position``."""
        size = _num_bytes(update)
        self.num_bytes += size
        last = self._last.get((position, update.index))
        if last is not None and len(self._waiting) >= _MAX_SEPARATE:
            last.add(update, size)
        else:
            last = self._last[position, update.index] = _Waiting(position, update, size)
            self._waiting.append(last)
        self._has_more.set()

    def end(self, error: Exception | None = None) -> None:
        """End after the updates that wait, with ``error`` if there is one. The first error stays:
        further ones are its consequences."""
        self._end = self._end or error or StopAsyncIteration()
        self._has_more.set()

    def interrupt(self, error: Exception) -> None:
        """Drop the updates that wait and end with ``error``."""
        self._waiting.clear()
        self._last.clear()
        self.num_bytes = 0
        self._end = error
        self._has_more.set()

    def __aiter__(self) -> Updates:
        return self

    async def __anext__(self) -> tuple[int, Update] | None:
        if not self._waiting and self._end is None:
            self._has_more.clear()
            try:
                async with asyncio.timeout(self._patience):
                    await self._has_more.wait()
            except TimeoutError:
                return None
        if not self._waiting:
            assert self._end is not None
            raise self._end
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
        mine.prompt_logprobs = mine.prompt_logprobs or update.prompt_logprobs
        mine.num_cached_tokens = max(mine.num_cached_tokens, update.num_cached_tokens)
        mine.finish_reason, mine.stop_reason = update.finish_reason, update.stop_reason
        mine.abort = update.abort
        self.size += size


def _num_bytes(update: Update) -> int:
    """Without the logprobs of the prompt: the prompt's length bounds them."""
    size = _UPDATE_BYTES + len(update.text) + _TOKEN_BYTES * len(update.token_ids)
    entries: list[TokenLogprobs] = update.logprobs or []
    return size + sum(_LOGPROBS_BYTES + _ALTERNATIVE_BYTES * len(e.token_ids) for e in entries)
