"""Checks of requests that may take long, beside the engine's steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from vllm_di.components.interfaces import Engine
from vllm_di.components.messages import EngineRequest
from vllm_di.errors import RequestError

THREADS = 4
"""Requests that are checked at the same time; others wait for these."""
log = logging.getLogger(__name__)


class Checked(NamedTuple):
    """A request whose check has ended."""

    request: EngineRequest
    error: RequestError | None


class Checks:
    """Runs ``Engine.check`` on threads for requests with a grammar. The engine's thread calls all
    methods; ``done`` is called by the threads."""

    def __init__(self, engine: Engine, done: Callable[[Checked], None]) -> None:
        self._engine, self._done = engine, done
        self._open: set[str] = set()
        self._threads: ThreadPoolExecutor | None = None

    def begin(self, request: EngineRequest) -> bool:
        """Whether the request is now being checked; False for one that needs no check."""
        if request.params.structured_output is None:
            return False
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, "check")
        self._open.add(request.request_id)
        self._threads.submit(self._check, request)
        return True

    def end(self, checked: Checked) -> bool:
        """Whether the request is to be added: not one that was aborted meanwhile. Raises the
        RequestError of the check."""
        if checked.request.request_id not in self._open:
            return False
        self._open.discard(checked.request.request_id)
        if checked.error is not None:
            raise checked.error
        return True

    def abort(self, request_id: str) -> None:
        self._open.discard(request_id)

    def _check(self, request: EngineRequest) -> None:
        error: RequestError | None = None
        try:
            self._engine.check(request)
        except RequestError as refusal:
            error = refusal
        except Exception as failure:
            log.exception("a request could not be checked")
            error = RequestError(f"{type(failure).__name__}: {failure}", status=500)
        self._done(Checked(request, error))
