"""A rate limit for log lines that clients can cause."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_SECONDS = 60.0


class Rarely:
    """A log line that appears at most once a minute and says how many were left out."""

    def __init__(
        self,
        log: logging.Logger,
        seconds: float = _SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._seconds, self._clock = log, seconds, clock
        self._next = float("-inf")
        self._num_left_out = 0

    def warning(self, text: str, *values: object) -> None:
        now = self._clock()
        if now < self._next:
            self._num_left_out += 1
            return
        note = f" ({self._num_left_out} more since the last such line)"
        self._log.warning(text + (note if self._num_left_out else ""), *values)
        self._next, self._num_left_out = now + self._seconds, 0
