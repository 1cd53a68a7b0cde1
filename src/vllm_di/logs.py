"""How log lines look: plain text, or one JSON object a line for whatever collects them.

Logging belongs to a process, so each process sets it once, where it begins.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from logging.handlers import MemoryHandler
from types import TracebackType
from typing import Any

import orjson

TEXT_FORMAT = "%(levelname)s %(message)s"
JSON = "json"
_MOST_HELD = 10_000

log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "message", "process", "pid"}``, then ``exception`` where there
    is one, and what the line says of its own: ``extra={"fields": {"request_id": ...}}``."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": self._process,
            "pid": record.process,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        line |= getattr(record, "fields", {})
        return orjson.dumps(_clean(line), default=str).decode()


def _clean(line: dict[str, Any]) -> dict[str, Any]:
    """JSON has no lone surrogates, which names of files may hold."""
    return {
        key: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for key, value in line.items()
    }


def configure(log_format: str, *, process: str = "api", level: int = logging.NOTSET) -> None:
    """Set this process's root logger, which lets warnings and errors through. ``json`` also takes
    what Python would print by itself: unhandled exceptions, here and in threads, and warnings.
    ``level``: of the handler."""
    if log_format != JSON:
        logging.basicConfig(level=logging.WARNING, format=TEXT_FORMAT)
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    handler.setLevel(level)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _unhandled
    threading.excepthook = _unhandled_in_thread


def configure_child(log_format: str, process: str, level: int = logging.NOTSET) -> None:
    """For a process that another one started. Text needs no setting: Python prints warnings and
    errors as they are."""
    if log_format == JSON:
        configure(log_format, process=process, level=level)


@dataclass
class Held:
    """``format`` is set as soon as it is known."""

    format: str = "text"


@contextmanager
def held_back() -> Iterator[Held]:
    """Keep the lines of this block, in which the format becomes known, and write them at its end
    in that format."""
    root, held = logging.getLogger(), Held()
    others = [*root.handlers]
    early = MemoryHandler(_MOST_HELD, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    root.addHandler(early)
    try:
        yield held
    finally:
        root.removeHandler(early)
        configure(held.format)
        for record in early.buffer:
            for handler in root.handlers:
                if handler not in others and record.levelno >= handler.level:
                    handler.handle(record)
        early.close()


def _unhandled(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    log.critical("this process ends: %s", error, exc_info=(kind, error, trace))


def _unhandled_in_thread(event: threading.ExceptHookArgs) -> None:
    if event.exc_value is None or issubclass(event.exc_type, SystemExit):
        return
    name = event.thread.name if event.thread is not None else "a thread"
    trace = (event.exc_type, event.exc_value, event.exc_traceback)
    log.critical("%s ends: %s", name, event.exc_value, exc_info=trace)
