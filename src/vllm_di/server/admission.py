"""Who may come in: the bounded queue, and the gate that closes when the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm_di.components.interfaces import EngineClient
from vllm_di.errors import EngineDeadError, QueueFullError, RequestError
from vllm_di.server.errors import unavailable


class Admission:
    """Counts the texts that the engine works on, and can interrupt all answers."""

    def __init__(self, engine: EngineClient, max_queue: int) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._interrupts: set[Callable[[Exception], None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0
        self.draining = False

    def check_open(self) -> None:
        """Raise what a new request must be told when it cannot be served: 503."""
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
        """Room for ``count`` texts. Each call of what is yielded gives back one place, when the
        engine is done with that text; the end of the block gives back those that are left. Raises
        QueueFullError (429)."""
        self.check_open()
        if count > self._max_queue:
            raise RequestError(
                f"one request may ask for {self._max_queue} texts (prompts times n), got {count}",
                param="n",
            )
        if self.in_flight + count > self._max_queue:
            raise QueueFullError(
                f"the queue is full: {self.in_flight} texts of {self._max_queue} are in flight"
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
        """Return when every answer has been sent."""
        await self._idle.wait()

    def interrupt_all(self, error: Exception) -> None:
        """End every request in flight with ``error``."""
        for interrupt in list(self._interrupts):
            interrupt(error)
