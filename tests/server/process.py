"""``python -m tests.server.process DELAY [KEY=NUMBER ...]``: a server round the echo engine in a
process of its own. Prints its address, and at the end how many requests the engine still had.
With ``patience=N`` the engine waits after N tokens of each request, until SIGUSR1."""

from __future__ import annotations

import asyncio
import signal
import sys

from tests.server.fakes import EchoEngine, make_server


async def main() -> None:
    delay, *settings = sys.argv[1:]
    numbers = {name: float(number) for name, number in (s.split("=") for s in settings)}
    patience = numbers.pop("patience", None)
    engine = EchoEngine(delay=float(delay), patience=None if patience is None else int(patience))
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, engine.go_on.set)
    server = make_server(engine, port=0, **numbers)
    running = asyncio.create_task(server.run())
    while server.address is None:
        await asyncio.sleep(0.001)
    sys.stdout.write(f"{server.address}\n")
    sys.stdout.flush()
    await running
    sys.stdout.write(f"left={len(engine.live)} aborted={len(engine.aborted)}\n")


if __name__ == "__main__":
    asyncio.run(main())
