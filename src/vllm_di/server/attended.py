"""Work for one client request that ends when nobody waits for it any longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from starlette.types import Receive

from vllm_di.errors import RequestError
from vllm_di.server.errors import ClientGone


@asynccontextmanager
async def attended(
    tasks: Sequence[asyncio.Task[None]],
    receive: Receive,
    interrupt: Callable[[Exception], None],
    *,
    timeout: float | None,
) -> AsyncIterator[None]:
    """Inside this block ``interrupt`` is called when the client has gone, and after ``timeout``
    seconds. Leaving it, for whatever reason, cancels ``tasks`` and waits for their ends."""
    loop = asyncio.get_running_loop()
    watch = loop.create_task(_watch_connection(receive, interrupt))
    timer = None
    if timeout is not None:
        late = RequestError(f"the answer took more than {timeout:g} s", code="timeout", status=504)
        timer = loop.call_later(timeout, interrupt, late)
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        for task in (*tasks, watch):
            task.cancel()
        await asyncio.gather(*tasks, watch, return_exceptions=True)


async def _watch_connection(receive: Receive, interrupt: Callable[[Exception], None]) -> None:
    """The body has been read, so the only message still to come is the disconnect."""
    with suppress(OSError):
        while (await receive())["type"] != "http.disconnect":
            pass
    interrupt(ClientGone())
