"""Lines that say what a long start is at: kernels being compiled, and how many are done.

They are log records: a part deep in a container needs nothing handed in to be heard.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)


def tell(text: str) -> None:
    """One line, as far as the work is now."""
    _log.info("%s", text)


@contextmanager
def shown(show: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, each line of this process goes to ``show`` too."""
    handler = _Shown(show)
    level = _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)


def print_line(text: str) -> None:
    """To standard error, as the command line says things."""
    sys.stderr.write(f"vllm-di: {text}\n")
    sys.stderr.flush()


class _Shown(logging.Handler):
    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())
