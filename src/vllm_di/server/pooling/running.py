"""Runs the texts of one client request on the engine, a number of them at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing

from starlette.types import Receive

from vllm_di.components.interfaces import RequestTimes
from vllm_di.components.messages import EngineRequest, TokenOutput
from vllm_di.errors import RequestError
from vllm_di.frontend.requests import failure
from vllm_di.server.attended import attended
from vllm_di.server.service import Service

MOST_AT_ONCE = 256
"""Texts of one request that the engine has at the same time: others come in between."""


async def run_all(
    service: Service,
    requests: Sequence[EngineRequest],
    receive: Receive,
    ended_one: Callable[[RequestTimes], None],
) -> list[TokenOutput]:
    """The outputs, in the order of ``requests``; ``ended_one`` hears of each. What still runs is
    aborted when one fails, when the client has gone and when the server stops. Raises RequestError,
    and what ``Admission.enter`` raises."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    outputs: list[TokenOutput | None] = [None] * len(requests)
    todo = iter(range(len(requests)))

    def end(error: BaseException | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    async def work() -> None:
        for index in todo:
            outputs[index] = await _run(service, requests[index], ended_one)

    def worked(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            end(error)
        elif all(worker.done() for worker in workers):
            end(None)

    count = min(len(requests), MOST_AT_ONCE, service.config.max_queue)
    with service.admission.enter(count, end):
        workers = [loop.create_task(work()) for _ in range(count)]
        for worker in workers:
            worker.add_done_callback(worked)
        timeout = service.config.request_timeout_seconds
        async with attended(workers, receive, end, timeout=timeout):
            await ended
    return [output for output in outputs if output is not None]


async def _run(
    service: Service, request: EngineRequest, ended: Callable[[RequestTimes], None]
) -> TokenOutput:
    """Raises RequestError where the engine refuses the request or fails on it."""
    begin, num_prompt = time.monotonic(), len(request.prompt_token_ids)
    reason, queued, metrics = "abort", 0.0, service.metrics.of(0)
    try:
        stream = service.engine.generate(request)
        async with aclosing(stream) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                metrics = service.metrics.of(output.replica)
                if output.error is not None:
                    reason = "error"
                    raise failure(output)
                if output.finish_reason is not None:
                    reason, queued = output.finish_reason, output.queue_time
                    metrics.tokens(num_prompt, 0, None, None)
                    return output
        raise RequestError("the engine gave no vector", status=500)
    finally:
        seconds = time.monotonic() - begin
        times = RequestTimes(
            finish_reason=reason,
            num_prompt_tokens=num_prompt,
            num_generated_tokens=0,
            max_tokens=None,
            n=1,
            end_to_end=seconds,
            queue=queued,
            prefill=max(0.0, seconds - queued),
            decode=0.0,
        )
        metrics.finished(times)
        ended(times)
