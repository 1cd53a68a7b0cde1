"""The errors that a user can meet, as one small tree. Everything else that is raised is a bug of
ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VllmDiError(Exception):
    """Root of the tree: a message for a person, with its place. The command line prints it without
    a traceback."""


class ConfigError(VllmDiError, ValueError):
    """The config is wrong: group, option, key, type, value, class or cycle.

    ``key`` names a key (``worker.num_blocks``) or a slot of a worker, where a component raises
    after it was built, and does not know where the key was set: ``WorkerLauncher.placed`` puts
    file and line before the message.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class PortError(ConfigError):
    """A port (built in or out of tree) cannot be used: broken package, absent driver, name
    clash."""


class CheckpointError(VllmDiError):
    """A model's files are missing, damaged or do not fit the model's config."""


class UnsupportedModelError(CheckpointError):
    """No model class of ours, nor the transformers fallback, runs this architecture."""


class EngineDeadError(VllmDiError):
    """The engine process or one of its workers died; requests in flight cannot be answered."""


class RequestError(VllmDiError, ValueError):
    """One request is wrong. Carries what an OpenAI error body needs.

    ``param`` names the offending field, ``code`` is OpenAI's machine-readable word, ``status`` the
    HTTP status.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


class QueueFullError(RequestError):
    """The bounded queue is full; the client should retry after ``retry_after`` seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message, code="queue_full", status=429)
        self.retry_after = retry_after


def one_line(error: BaseException, most: int = 300) -> str:
    """What an exception that is none of ours says, with its class: ``OSError: no such device``."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:most]}{'...' if len(text) > most else ''}" if text else name


def nearest(name: str, options: Iterable[str]) -> str:
    """A ready-made tail for a message: ``; did you mean 'x'?`` or nothing. An option with all words
    of the name (``num_hidden_layers`` for ``num_layers``) comes before one that looks like it."""
    known, words = sorted(options), set(name.split("_"))
    longer = [o for o in known if len(words) > 1 and words < set(o.split("_"))]
    close = difflib.get_close_matches(name, longer or known, n=1, cutoff=0 if longer else 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
