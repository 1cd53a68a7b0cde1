"""Several engine processes behind one EngineClient. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec

from vllm_di.components.interfaces import Replica, ReplicaLoad, Router
from vllm_di.components.messages import EngineRequest, EngineStats, TokenOutput, WorkerReport
from vllm_di.errors import EngineDeadError, PortError, RequestError, VllmDiError
from vllm_di.server.client_state import StatefulClient
from vllm_di.server.engine_client import ENGINE, ProcessEngineClient

MOST_DEATHS = 2
"""A request that was in so many engines when they died gets the error: it may be what kills
them."""

log = logging.getLogger(__name__)


class ReplicatedEngineClient(StatefulClient):
    """N engines, each with its own line, and a router that chooses one for each request.

    An engine that dies is replaced as that of ``ProcessEngineClient`` is, up to ``restarts`` times
    in ten minutes each; the others go on. Its requests go on, too: to another replica, with the
    tokens that they have sent already, so that the answer continues as it does after a preemption.
    The client is ``dead`` once no replica is left. The first engine starts alone: it may compile
    and measure what the others then find in the cache. All must have been ready once before
    requests are taken; a start that fails is an error, whichever replica it is.
    """

    def __init__(
        self, count: int, make: Callable[..., ProcessEngineClient] = ProcessEngineClient
    ) -> None:
        super().__init__()
        self.router: Router | None = None
        """To be set before the first request."""
        lost = "this replica is lost, the others go on"
        self._lines = [_Line(i, make(f"replica {i}", last_words=lost)) for i in range(count)]
        self._open: set[str] = set()
        self._last_death: str | None = None
        self._starting: asyncio.Task[None] | None = None
        for line in self._lines:
            line.client.on_stats = partial(self._on_stats, line)
            line.client.on_change = self._changed
            line.client.on_death = partial(self._on_death, line)

    async def start(self, assemblies: Sequence[bytes], command: Sequence[str] = ENGINE) -> None:
        """Start the first engine; the others follow once it is ready. One assembly for each."""
        first, *others = zip(self._lines, assemblies, strict=True)
        await first[0].client.start(first[1], command)
        self._starting = asyncio.create_task(self._start_others(first[0], others, command))

    @property
    def restarts(self) -> int:
        """Of each replica."""
        return self._lines[0].client.restarts

    @restarts.setter
    def restarts(self, count: int) -> None:
        for line in self._lines:
            line.client.restarts = count

    def replicas(self) -> Sequence[Replica]:
        return [line.replica() for line in self._lines]

    def reports(self) -> Sequence[WorkerReport]:
        found = [line.client.report or self.report for line in self._lines]
        return [report for report in found if report is not None]

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        self._check_ready()
        if request.request_id in self._open:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        self._open.add(request.request_id)
        sent: list[int] = []
        deaths: set[int] = set()
        num_deaths = 0
        try:
            while True:
                if not await self._one_takes_requests(self._lines):
                    raise self._error or EngineDeadError("no replica is left")
                rest = _going_on(request, sent)
                line = self._choose(rest, deaths)
                held = len(rest.prompt_token_ids) + len(sent)
                line.begin(held)
                try:
                    async with aclosing(line.client.generate(rest)) as outputs:  # type: ignore[type-var]
                        async for output in outputs:
                            sent += output.token_ids
                            held += len(output.token_ids)
                            line.num_tokens += len(output.token_ids)
                            output.replica = line.number
                            if rest is not request:  # told already
                                output.num_cached_tokens, output.queue_time = 0, 0.0
                            yield output
                    return
                except EngineDeadError:
                    num_deaths += not line.draining
                    deaths.add(line.number)
                    if num_deaths >= MOST_DEATHS:
                        raise
                    if not await self._one_takes_requests(self._lines):
                        raise
                    log.warning(
                        "replica %d: request %s goes on elsewhere, behind %d tokens",
                        line.number,
                        request.request_id,
                        len(sent),
                    )
                finally:
                    line.end(held)
        finally:
            self._open.discard(request.request_id)

    async def replace(self, replica: int, patience: float) -> None:
        """Wait until another replica takes requests; give this one no new ones, wait ``patience``
        seconds at most for those that it has, which go on elsewhere then, and put a new engine in
        its place. Raises EngineDeadError where no other is left, or no new engine starts."""
        line = self._lines[replica]
        others = [other for other in self._lines if other is not line]
        if not await self._one_takes_requests(others):
            raise EngineDeadError(f"replica {replica} was not replaced: no other is left")
        if line.client.state != "ready":
            raise EngineDeadError(f"replica {replica} was not replaced: it is {line.client.stage}")
        line.draining = True
        self._changed()
        try:
            await line.idle(patience)
            await line.client.replace()
        finally:
            line.draining = False
            self._changed()
        if line.client.state != "ready":
            raise EngineDeadError(f"replica {replica} was not replaced: {line.client.failure}")

    async def replace_all(self, patience: float) -> None:
        """``replace`` each, one after the other."""
        for line in self._lines:
            try:
                await self.replace(line.number, patience)
            except EngineDeadError as error:
                log.error("%s", error)

    async def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await asyncio.gather(*(line.client.close() for line in self._lines))

    # -- inside -------------------------------------------------------------------------------

    async def _start_others(
        self, first: _Line, others: Sequence[tuple[_Line, bytes]], command: Sequence[str]
    ) -> None:
        try:
            await first.client.wait_ready()
            for line, assembly in others:
                await line.client.start(assembly, command)
            for line, _ in others:
                await line.client.wait_ready()
        except Exception as error:
            if not isinstance(error, VllmDiError):
                error = EngineDeadError(f"{type(error).__name__}: {error}")
            self._error = error
            self.failure = str(self._error)
            self.state = self.stage = "dead"
            self._dead.set()
        self._settled.set()
        self._changed()

    def _choose(self, request: EngineRequest, deaths: set[int]) -> _Line:
        """Of the replicas that take requests, and one does: rather one that shows signs of life,
        and in which the request saw no death."""
        usable = [line for line in self._lines if line.takes_requests]
        usable = [line for line in usable if not line.client.silent] or usable
        usable = [line for line in usable if line.number not in deaths] or usable
        assert self.router is not None, "given before the first request"
        loads = [line.load() for line in usable]
        number = self.router.choose(request, loads)
        for line in usable:
            if line.number == number:
                return line
        raise PortError(
            f"router: {type(self.router).__qualname__} chose replica {number}, of "
            f"{', '.join(str(load.replica) for load in loads)}"
        )

    async def _one_takes_requests(self, lines: Sequence[_Line]) -> bool:
        """Wait until one of these does; False once none ever will."""
        while not any(line.takes_requests for line in lines):
            if self.state == "dead" or all(line.client.state == "dead" for line in lines):
                return False
            await self._change.wait()
        return True

    def _on_stats(self, line: _Line, stats: EngineStats) -> None:
        stats.replica = line.number
        if self.on_stats is not None:
            self.on_stats(stats)

    def _on_death(self, line: _Line) -> None:
        self._last_death = line.client.failure
        if self.router is not None:
            self.router.forget(line.number)
        self._on_stats(line, EngineStats())  # it runs nothing, and its totals begin anew

    def _changed(self) -> None:
        """Work out what the client is as a whole."""
        lines = self._lines
        if self._settled.is_set() and self._error is None:
            self._unite([line.client for line in lines])
        elif self._error is None:
            waiting = [line for line in lines if line.client.state != "ready"]
            for line in waiting[:1]:
                self.stage = f"replica {line.number} of {len(lines)}: {line.client.stage}"
        super()._changed()

    def _unite(self, clients: Sequence[ProcessEngineClient]) -> None:
        ready = [client for client in clients if client.state == "ready"]
        if ready:
            self.state, self.stage, self.failure = "ready", "ready", None
            self.report = ready[0].report
            silent = all(client.silent for client in ready)
            self.silent = [name for c in ready for name in c.silent] if silent else ()
            return
        self.silent = ()
        starting = [client for client in clients if client.state == "starting"]
        self.failure = self._last_death
        if starting:
            self.state, self.stage = "starting", starting[0].stage
            return
        self.state = self.stage = "dead"
        self._error = EngineDeadError(f"no replica is left; the last ended so: {self.failure}")
        self._dead.set()


class _Line:
    """The client of one replica, and what it was sent."""

    def __init__(self, number: int, client: ProcessEngineClient) -> None:
        self.number, self.client = number, client
        self.draining = False
        """Whether it is to end: it takes no new requests."""
        self.num_requests = self.num_tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def takes_requests(self) -> bool:
        return self.client.state == "ready" and not self.draining

    def load(self) -> ReplicaLoad:
        return ReplicaLoad(self.number, self.num_requests, self.num_tokens)

    def replica(self) -> Replica:
        client = self.client
        state: Any = client.state
        if state == "ready" and self.draining:
            state = "draining"
        elif state == "ready" and client.silent:
            state = "unresponsive"
        return Replica(state, client.stage, client.failure, client.report, self.load())

    def begin(self, num_tokens: int) -> None:
        """A request of so many known tokens was sent."""
        self.num_requests += 1
        self.num_tokens += num_tokens
        self._idle.clear()

    def end(self, num_tokens: int) -> None:
        """A request that had so many tokens at last has ended."""
        self.num_requests -= 1
        self.num_tokens -= num_tokens
        if not self.num_requests:
            self._idle.set()

    async def idle(self, patience: float) -> None:
        """Return once it has no requests, or after ``patience`` seconds."""
        try:
            async with asyncio.timeout(patience):
                await self._idle.wait()
        except TimeoutError:
            log.warning(
                "replica %d: %d requests go on elsewhere, after a drain of %g s",
                self.number,
                self.num_requests,
                patience,
            )


def _going_on(request: EngineRequest, sent: Sequence[int]) -> EngineRequest:
    """The request as another engine takes it over; itself where nothing was sent yet."""
    return msgspec.structs.replace(request, generated_token_ids=list(sent)) if sent else request
