"""An EngineClient on an engine in this process, for tests that want to look into it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator

from vllm_di.components.interfaces import Engine, EngineClient
from vllm_di.components.messages import EngineRequest, TokenOutput


class LocalEngineClient(EngineClient):
    """Runs the engine's steps on the event loop, one for each round of it."""

    def __init__(self, engine: Engine) -> None:
        self.state, self.stage, self.failure = "ready", "ready", None
        self.report = engine.report
        self._engine = engine
        self._outputs: dict[str, list[TokenOutput]] = defaultdict(list)

    async def wait_ready(self) -> None:
        """Always ready."""

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        self._engine.add(request)
        while True:
            await asyncio.sleep(0)
            step = self._engine.step()
            if self.on_stats is not None:
                self.on_stats(step.stats)
            for output in step.outputs:
                self._outputs[output.request_id].append(output)
            for output in self._outputs.pop(request.request_id, []):
                yield output
                if output.finish_reason is not None:
                    return

    async def close(self) -> None:
        """Whoever opened the engine closes it."""
