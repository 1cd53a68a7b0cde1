"""Admission control: the bounded queue, which takes nothing more once the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm_di.components.interfaces import EngineClient
from vllm_di.errors import EngineDeadError, QueueFullError, RequestError
from vllm_di.server.errors import unavailable


class Admission:
    """Counts the choices that the engine works on, and can interrupt all requests."""

    def __init__(self, engine: EngineClient, max_queue: int) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._interrupts: set[Callable[[Exception], None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0
        self.draining = False

    def check_open(self) -> None:
        """Raise the 503 that a new request gets while none can be served."""
        if self._engine.state == "dead":
            raise EngineDeadError(self._engine.failure or "no reason is known")
        if self.draining:
            raise unavailable("the server is shutting down", "shutting_down")
        if self._engine.state == "starting":
            raise unavailable(f"the engine is starting: {self._engine.stage}", "starting")

    @contextmanager
    def enter(
        self, count: int, interrupt: Callable[[Exception], None]
    ) -> Iterator[Callable[[], None]]:
        """Take ``count`` places in the queue, one for each choice. Yields a function that gives
        back one of them, for when the engine is done with a choice; the end of the block gives back
        the rest. ``interrupt`` is called by ``interrupt_all``. Raises QueueFullError (429)."""
        self.check_open()
        if count > self._max_queue:
            raise RequestError(
                f"one request may ask for {self._max_queue} choices (prompts times n), got {count}",
                param="n",
            )
        if self.in_flight + count > self._max_queue:
            raise QueueFullError(
                f"the queue is full: {self.in_flight} choices of {self._max_queue} are in flight"
            )
        self.in_flight += count
        self._interrupts.add(interrupt)
        self._idle.clear()
        held = count

        def release() -> None:
            nonlocal held
            if held:
                held -= 1
                self.in_flight -= 1

        try:
            yield release
        finally:
            self._interrupts.discard(interrupt)
            self.in_flight -= held
            held = 0
            if not self._interrupts:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Return once every response has been sent."""
        await self._idle.wait()

    def interrupt_all(self, error: Exception) -> None:
        """End every request in flight with ``error``."""
        for interrupt in list(self._interrupts):
            interrupt(error)
