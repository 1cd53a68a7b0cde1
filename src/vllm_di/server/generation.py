"""Runs the choices of one client request on the engine, as one stream of updates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial

from starlette.types import Receive

from vllm_di.components.interfaces import EngineClient
from vllm_di.components.messages import EngineRequest
from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Generation, Update
from vllm_di.server.attended import attended
from vllm_di.server.service import Service
from vllm_di.server.updates import Updates


@asynccontextmanager
async def running(
    service: Service,
    generations: Sequence[Generation],
    receive: Receive,
    num_unsent: Callable[[], int],
    *,
    patience: float | None,
) -> AsyncIterator[Updates]:
    """The updates of ``generations``, which run on the engine inside this block. Leaving the block,
    for whatever reason, aborts what still runs. Raises what ``Admission.enter`` raises.

    A closed connection, a time-out, a slow reader and ``Admission.interrupt_all`` abort at once,
    even while the writer is blocked; the updates then end with an error. ``num_unsent`` gives
    the bytes that the writer has taken and not yet sent. A reader is too slow when these and the
    updates behind them exceed ``server.max_unsent_bytes``. ``patience``: see ``Updates``.
    """
    config = service.config
    updates = Updates(patience)

    def interrupt(error: Exception) -> None:
        for choice in choices:
            choice.cancel()
        updates.interrupt(error)

    def put(position: int, update: Update) -> None:
        updates.put(position, update)
        if update.finish_reason is not None and all(g.finished for g in generations):
            updates.end()
        # While another task runs, the writer has unsent bytes only if the client does not keep up.
        if (unsent := num_unsent()) and unsent + updates.num_bytes > config.max_unsent_bytes:
            interrupt(
                RequestError(
                    "the client reads too slowly: more than server.max_unsent_bytes="
                    f"{config.max_unsent_bytes} waited for it",
                    code="client_too_slow",
                    status=408,
                )
            )

    def ended(choice: asyncio.Task[None]) -> None:
        release()
        error = None if choice.cancelled() else choice.exception()
        if isinstance(error, Exception):
            updates.end(error)

    loop = asyncio.get_running_loop()
    count = sum(len(g.requests) for g in generations)
    with service.admission.enter(count, interrupt) as release:
        choices = [
            loop.create_task(_generate(service, generation, request, partial(put, position)))
            for position, generation in enumerate(generations)
            for request in generation.requests
        ]
        for choice in choices:
            choice.add_done_callback(ended)
        timeout = config.request_timeout_seconds
        async with attended(choices, receive, interrupt, timeout=timeout):
            yield updates


async def _generate(
    service: Service,
    generation: Generation,
    request: EngineRequest,
    put: Callable[[Update], None],
) -> None:
    """Run one choice. Leaving the engine's iterator early aborts it there."""
    name = request.request_id
    num_prompt = len(generation.prompt_token_ids) if request is generation.requests[0] else 0
    engine: EngineClient = service.engine
    metrics = service.metrics.of(0)
    try:
        async with aclosing(engine.generate(request)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                metrics = service.metrics.of(output.replica)
                update = generation.feed(output)
                times = generation.intervals(name) if output.token_ids else (None, None)
                metrics.tokens(num_prompt, len(update.token_ids), *times)
                num_prompt = 0  # counted once
                put(update)
                if update.abort:
                    break
    finally:
        metrics.finished(generation.times(name))
