"""What a client of engine processes is at, and what ended it. Imports no torch."""

from __future__ import annotations

import asyncio

from vllm_di.components.interfaces import EngineClient
from vllm_di.components.messages import WorkerReport
from vllm_di.errors import EngineDeadError, VllmDiError


class StatefulClient(EngineClient):
    """Begins as ``starting``. Who derives from it sets ``_settled`` once the start is over, well or
    not, and ``_dead``, with ``_error``, once nothing will answer any more."""

    def __init__(self) -> None:
        self.state, self.stage = "starting", "start"
        self.failure: str | None = None
        self.report: WorkerReport | None = None
        self._error: VllmDiError | None = None
        self._settled, self._dead = asyncio.Event(), asyncio.Event()
        self._change = asyncio.Event()
        """Set, and replaced by a new one, at the next change of state, stage or silence."""

    async def wait_ready(self) -> None:
        await self._settled.wait()
        if self._error is not None:
            raise self._error

    async def wait_dead(self) -> None:
        await self._dead.wait()
        assert self._error is not None
        raise self._error

    def _changed(self) -> None:
        """To be called after each change of state, stage or silence."""
        self._change.set()
        self._change = asyncio.Event()

    def _check_ready(self) -> None:
        """Raises what ended it, or EngineDeadError while it starts."""
        if self.state != "ready":
            raise self._error or EngineDeadError(f"the engine is not ready: {self.stage}")
