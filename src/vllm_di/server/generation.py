"""Runs the texts of one client request on the engine and merges what they give."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack, aclosing, suppress
from types import TracebackType

from starlette.types import Receive

from vllm_di.components.interfaces import EngineClient, Metrics
from vllm_di.components.messages import EngineRequest
from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Generation, Update
from vllm_di.server.admission import Admission
from vllm_di.server.errors import ClientGone
from vllm_di.server.updates import Updates


class Run:
    """An ``async with`` block in which the texts of some generations are made. Leaving it, however
    that happens, aborts what still runs.

    A closed connection, a time-out, a client that reads too slowly and ``interrupt`` end it too:
    the engine is told at once, and ``next`` raises.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        engine: EngineClient,
        admission: Admission,
        metrics: Metrics,
        receive: Receive,
        *,
        timeout: float | None,
        max_unsent_bytes: int,
    ) -> None:
        self._generations = generations
        self._engine = engine
        self._admission = admission
        self._metrics = metrics
        self._receive = receive
        self._timeout = timeout
        self._max_unsent_bytes = max_unsent_bytes
        self._updates = Updates()
        self._texts: list[asyncio.Task[None]] = []
        self._watch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._places = ExitStack()
        self.num_writing = 0
        """Bytes of a stream that its writer has taken and not yet sent. There are some while
        another task runs only when the client does not keep up."""

    async def __aenter__(self) -> Run:
        count = sum(len(g.requests) for g in self._generations)
        release = self._places.enter_context(self._admission.enter(count, self.interrupt))
        loop = asyncio.get_running_loop()
        for position, generation in enumerate(self._generations):
            for request in generation.requests:
                text = loop.create_task(self._pump(position, generation, request))
                text.add_done_callback(lambda _: release())
                self._texts.append(text)
        self._watch = loop.create_task(self._watch_connection())
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
        tasks = [*self._texts, *([self._watch] if self._watch else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._places.close()

    @property
    def exhausted(self) -> bool:
        """Whether every text has ended and all updates were taken."""
        return self._updates.is_empty and all(g.finished for g in self._generations)

    async def next(self, patience: float | None = None) -> tuple[int, Update] | None:
        """The next update and the position of its generation; None when there was none for
        ``patience`` seconds. Raises what ended the run."""
        if self._updates.is_empty and patience is not None:
            try:
                async with asyncio.timeout(patience):
                    return await self._updates.get()
            except TimeoutError:
                return None
        return await self._updates.get()

    def interrupt(self, error: Exception) -> None:
        """Take all texts from the engine, also while the client does not read, and make ``next``
        raise, ahead of updates that wait."""
        for text in self._texts:
            text.cancel()
        self._updates.end(error)

    def _check_reader(self) -> None:
        waiting = self.num_writing + self._updates.num_bytes
        if self.num_writing and waiting > self._max_unsent_bytes:
            self.interrupt(
                RequestError(
                    "the client reads too slowly: more than server.max_unsent_bytes="
                    f"{self._max_unsent_bytes} waited for it",
                    code="client_too_slow",
                    status=408,
                )
            )

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
                    self._updates.put(position, update)
                    self._check_reader()
                    if update.abort:
                        break
        except Exception as error:
            self._updates.end(error, at_once=False)
        finally:
            self._metrics.finished(generation.times(name))

    async def _watch_connection(self) -> None:
        """The body has been read, so all that can still come is the end."""
        with suppress(OSError):
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self.interrupt(ClientGone())
