"""Runs the texts of one client request on the engine and merges what they give."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing, suppress
from types import TracebackType

from starlette.types import Receive

from vllm_di.components.interfaces import EngineClient, Metrics
from vllm_di.components.messages import EngineRequest
from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Generation, Update
from vllm_di.server.errors import ClientGone


class Run:
    """An ``async with`` block in which the texts of some generations are made. Leaving it, however
    that happens, aborts what still runs.

    A closed connection, a time-out and ``interrupt`` end it too: ``next`` raises.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        engine: EngineClient,
        metrics: Metrics,
        receive: Receive,
        timeout: float | None,
    ) -> None:
        self._generations = generations
        self._engine = engine
        self._metrics = metrics
        self._receive = receive
        self._timeout = timeout
        self._updates: asyncio.Queue[tuple[int, Update] | Exception] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Run:
        loop = asyncio.get_running_loop()
        jobs = [
            self._pump(position, generation, request)
            for position, generation in enumerate(self._generations)
            for request in generation.requests
        ]
        self._tasks = [loop.create_task(job) for job in (*jobs, self._watch_connection())]
        if self._timeout is not None:
            late = RequestError(
                f"the answer took more than {self._timeout:g} s", code="timeout", status=504
            )
            self._timer = loop.call_later(self._timeout, self.interrupt, late)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def exhausted(self) -> bool:
        """Whether every text has ended and all updates were taken."""
        return self._updates.empty() and all(g.finished for g in self._generations)

    async def next(self, patience: float | None = None) -> tuple[int, Update] | None:
        """The next update and the position of its generation; None when there was none for
        ``patience`` seconds. Raises what ended the run."""
        if self._updates.empty() and patience is not None:
            try:
                async with asyncio.timeout(patience):
                    item = await self._updates.get()
            except TimeoutError:
                return None
        else:
            item = await self._updates.get()
        if isinstance(item, Exception):
            raise item
        return item

    def interrupt(self, error: Exception) -> None:
        """Make ``next`` raise, ahead of updates that wait."""
        while not self._updates.empty():
            self._updates.get_nowait()
        self._updates.put_nowait(error)

    async def _pump(self, position: int, generation: Generation, request: EngineRequest) -> None:
        name = request.request_id
        is_first_output = request is generation.requests[0]
        update = None
        try:
            async with aclosing(self._engine.generate(request)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    update = generation.feed(output)
                    num_prompt = len(generation.prompt_token_ids) if is_first_output else 0
                    is_first_output = False
                    times = generation.intervals(name) if output.token_ids else (None, None)
                    self._metrics.tokens(num_prompt, len(update.token_ids), *times)
                    self._updates.put_nowait((position, update))
                    if update.abort:
                        break
        except Exception as error:
            self._updates.put_nowait(error)
        finally:
            self._metrics.finished(generation.times(name))

    async def _watch_connection(self) -> None:
        """The body has been read, so all that can still come is the end."""
        with suppress(OSError):
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self.interrupt(ClientGone())
