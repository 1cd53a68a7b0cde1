"""Faults against running servers: ``python -m tests.rigs.faults``, or ``make faults``.

Processes are killed and stopped, cached files damaged, the disk filled, clients fall silent, while
others ask on. Nothing may be lost: each request that was accepted ends with one terminal event,
what ends well has the right tokens, and a canary equals its golden after each fault. All on the
loopback, with a cache folder of its own. Exit status 1 where something was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

TINY = ["model=tiny", "tokenizer=bytes", "chat_template=plain", "platform=cpu"]
QUICK = ["executor.step_timeout=4", "server.engine_restarts=1000"]
RANKS = ["executor=multiprocess", "executor.tensor_parallel_size=2", "communicator=shared_memory"]
BODY = {"prompt": "the canary", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
LOAD = {"prompt": "all the others", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
HANG = 180.0
"""Seconds after which a condition that does not come true ends the rig."""


class Lost(Exception):
    """Something that must not be lost was."""


class Figures:
    """What happened."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.lost: list[str] = []
        self.noticed: list[float] = []
        """Seconds until a stopped process showed in ``/readyz``."""

    def show(self, seconds: float) -> None:
        total = sum(self.faults.values())
        for kind, count in sorted(self.faults.items()):
            print(f"{count:6}  {kind}")
        print(f"{total:6}  faults in {seconds:.0f} s; the canary equalled its golden after each")
        refused = self.endings.pop("refused", 0)
        endings = ", ".join(f"{count} {name}" for name, count in sorted(self.endings.items()))
        print(f"{self.endings.total():6}  requests accepted: {endings}")
        print(f"{refused:6}  requests refused, with Retry-After, while there was no engine")
        if self.noticed:
            print(f"        a stopped process showed after {max(self.noticed):.1f} s at most")
        print(f"{len(self.lost):6}  lost", *self.lost[:20], sep="\n        ")


class Server:
    """``vllm-di serve`` in a process, and what it has started."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"server-{self.port}.log"
        command = [sys.executable, "-m", "vllm_di.cli", "serve", f"server.port={self.port}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *overrides],
                stdout=log,
                stderr=log,
                env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
            )
        self.web = httpx.AsyncClient(base_url=self.url, timeout=HANG)

    def engine(self) -> psutil.Process:
        """The newest engine process."""
        found = [
            child
            for child in psutil.Process(self.process.pid).children()
            if "vllm_di.containers.engine_process" in child.cmdline()
        ]
        return max(found, key=lambda child: child.create_time())

    def rank(self, number: int) -> psutil.Process:
        return next(
            child
            for child in self.engine().children()
            if any(f'"rank":{number}' in word for word in child.cmdline())
        )

    async def status(self) -> tuple[int, dict[str, Any]]:
        answer = await self.web.get("/readyz")
        return answer.status_code, answer.json()

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        begin = time.monotonic()
        while not await condition():
            if self.process.poll() is not None or time.monotonic() - begin > HANG:
                raise Lost(f"{what}: never came; see {self.log}:\n{self.log.read_text()[-2000:]}")
            await asyncio.sleep(0.02)

    async def until_ready(self) -> None:
        async def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return (await self.status())[0] == 200
            return False

        await self.until(ready, "ready")

    async def canary(self) -> str:
        answer = await self.web.post("/v1/completions", json=BODY)
        if answer.status_code != 200:
            raise Lost(f"canary: {answer.status_code} {answer.text}")
        text: str = answer.json()["choices"][0]["text"]
        return text

    async def close(self) -> int:
        await self.web.aclose()
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, HANG)


# ------------------------------------------------------------------------------------------------
# those who ask on


async def ask(server: Server, figures: Figures, golden: str, *, stream: bool) -> None:
    """One request, its ending counted. An accepted one has exactly one terminal event."""
    text, ends = "", []
    try:
        body = LOAD | {"stream": stream}
        async with server.web.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                told = json.loads(await answer.aread())["error"]["code"]
                started = told == "engine_dead"  # it was in the engine when that died
                figures.endings["with an error" if started else "refused"] += 1
                if not started and "retry-after" not in answer.headers:
                    figures.lost.append(f"{answer.status_code} {told} without Retry-After")
                await asyncio.sleep(0.1)
                return
            if not stream:
                text = json.loads(await answer.aread())["choices"][0]["text"]
                ends.append("complete")
            else:
                async for line in answer.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        ends.append("complete")
                    elif "error" in (event := json.loads(line[6:])):
                        ends.append("with an error")
                    else:
                        text += event["choices"][0]["text"]
    except httpx.TransportError as error:
        figures.lost.append(f"a connection broke: {error!r}")
        return
    if len(ends) != 1:
        figures.lost.append(f"terminal events: {ends}")
    elif ends == ["complete"] and text != golden:
        figures.lost.append(f"wrong text: {text[:60]!r}")
    elif not golden.startswith(text):
        figures.lost.append(f"wrong text before an error: {text[:60]!r}")
    figures.endings[ends[0] if ends else "without an end"] += 1


@contextlib.asynccontextmanager
async def load(server: Server, figures: Figures, golden: str) -> AsyncIterator[None]:
    """Four clients, one request after the other, while the block runs."""
    stop = asyncio.Event()

    async def go(stream: bool) -> None:
        while not stop.is_set():
            await ask(server, figures, golden, stream=stream)

    tasks = [asyncio.create_task(go(stream)) for stream in (True, True, True, False)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


Fault = Callable[[Server, Figures], Awaitable[None]]

# ------------------------------------------------------------------------------------------------
# faults: each returns when the server has felt it


async def kill_engine(server: Server, figures: Figures) -> None:
    server.engine().kill()
    await _not_ready(server)


async def kill_rank(server: Server, figures: Figures) -> None:
    server.rank(random.randrange(2)).kill()
    await _not_ready(server)


async def stop_engine(server: Server, figures: Figures) -> None:
    await _stop(server, figures, server.engine(), "engine")


async def stop_rank(server: Server, figures: Figures) -> None:
    number = random.randrange(2)
    await _stop(server, figures, server.rank(number), f"worker {number}")


async def hang_engine(server: Server, figures: Figures) -> None:
    server.engine().suspend()
    await _replaced(server, "gave no sign of life")


async def hang_rank(server: Server, figures: Figures) -> None:
    server.rank(number := random.randrange(2)).suspend()
    await _replaced(server, f"worker {number} gave no answer")


async def silent_client(server: Server, figures: Figures) -> None:
    """Says nothing, or half a request, and stays while the canary is asked."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(random.choice((b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\n")))
        await server.canary()


async def slow_client(server: Server, figures: Figures) -> None:
    """Asks for much and reads nothing, then goes."""
    body = json.dumps(LOAD | {"stream": True, "n": 4}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await server.canary()


def damage(how: str) -> Fault:
    """A compiled kernel that the next engine finds damaged."""

    async def fault(server: Server, figures: Figures) -> None:
        [library] = kernels(server).glob("cpu-*.so")
        copy = library.with_name(".copy")  # the running engine keeps the file that it has mapped
        shutil.copyfile(library, copy)
        data = copy.read_bytes()
        if how == "cut":
            copy.write_bytes(data[: len(data) // 2])
        elif how == "flipped":
            copy.write_bytes(data[:5000] + bytes([data[5000] ^ 255]) + data[5001:])
        else:
            copy.write_bytes(b"")
        os.replace(copy, library)
        await kill_engine(server, figures)
        await server.until_ready()
        if "made anew" not in server.log.read_text():
            raise Lost("no line says that the kernel was made anew")

    return fault


async def full_disk(server: Server, figures: Figures) -> None:
    """A new engine finds a cache without its kernels and without room."""
    folder = kernels(server)
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    subprocess.run(command, check=True)
    try:
        await kill_engine(server, figures)
        await server.until_ready()
        if any(folder.glob("cpu-*.so")):
            raise Lost("a kernel of more than 64 KiB lies on a disk of 64 KiB")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def kernels(server: Server) -> Path:
    return server.log.parent / "cache" / "vllm-di" / "kernels"


async def _not_ready(server: Server) -> None:
    async def gone() -> bool:
        return (await server.status())[0] == 503

    await server.until(gone, "not ready after a kill")


async def _stop(server: Server, figures: Figures, process: psutil.Process, name: str) -> None:
    """Stopped until it shows, then let go on."""
    process.suspend()
    begin = time.monotonic()

    async def shown() -> bool:
        return (await server.status())[1].get("processes") == [name]

    try:
        await server.until(shown, f"{name} named as unresponsive")
        figures.noticed.append(time.monotonic() - begin)
    finally:
        process.resume()


async def _replaced(server: Server, why: str) -> None:
    async def told() -> bool:
        return why in (await server.status())[1].get("reason", "")

    await server.until(told, why)


# ------------------------------------------------------------------------------------------------


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
        if subprocess.run(command, capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


def plan(count: int, *, ranks: bool) -> Iterator[tuple[str, Fault]]:
    """(name, fault), about ``count`` of them."""
    shares: list[tuple[int, str, Fault]]
    if ranks:
        shares = [(6, "a rank killed", kill_rank), (7, "a rank stopped", stop_rank)]
        shares += [(2, "a rank stopped for good", hang_rank), (3, "an engine killed", kill_engine)]
    else:
        shares = [(18, "an engine killed", kill_engine), (12, "an engine stopped", stop_engine)]
        shares += [(3, "an engine stopped for good", hang_engine)]
        shares += [(22, "a silent client", silent_client), (22, "a slow client", slow_client)]
        for how in ("cut", "flipped", "emptied"):
            shares.append((1, f"a kernel {how} in the cache", damage(how)))
        if may_mount():
            shares.append((1, "a full disk", full_disk))
        else:
            print("        this user may mount nothing: no full disk")
    whole = sum(share for share, _, _ in shares)
    for share, name, fault in shares:
        for _ in range(max(1, round(count * share / whole))):
            yield name, fault


async def against(overrides: list[str], count: int, folder: Path, figures: Figures) -> None:
    """Faults against one server, in random order."""
    server = Server(folder, [*TINY, *QUICK, *overrides])
    try:
        await server.until_ready()
        golden = await server.canary()
        other = (await server.web.post("/v1/completions", json=LOAD)).json()["choices"][0]["text"]
        faults = list(plan(count, ranks=bool(overrides)))
        random.shuffle(faults)
        for name, fault in faults:
            async with load(server, figures, other):
                await asyncio.sleep(0.05)  # so that requests are under way
                await fault(server, figures)
                await server.until_ready()
            figures.faults[name] += 1
            if (text := await server.canary()) != golden:
                raise Lost(f"after {name}: the canary gave {text!r}, expected {golden!r}")
    finally:
        status = await server.close()
    if status:
        raise Lost(f"the server ended with exit status {status}: {server.log.read_text()[-2000:]}")


async def beyond_the_limit(folder: Path, figures: Figures) -> None:
    """A second death within ten minutes ends the server, with a status and a line."""
    server = Server(folder, [*TINY, "server.engine_restarts=1"])
    for _ in range(2):
        await server.until_ready()
        server.engine().kill()
        figures.faults["an engine killed, one restart"] += 1
        with contextlib.suppress(httpx.TransportError):
            while server.process.poll() is None and (await server.status())[0] == 200:
                await asyncio.sleep(0.02)
    status = await asyncio.to_thread(server.process.wait, HANG)
    await server.web.aclose()
    if status != 1 or "no restart is left (server.engine_restarts=1" not in server.log.read_text():
        raise Lost(f"exit status {status}, expected 1 and why: {server.log.read_text()[-2000:]}")


async def run(count: int, seed: int) -> Figures:
    random.seed(seed)
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="vllm-di-faults-") as name:
        folder = Path(name)
        await against([], count - count // 5 - 2, folder, figures)
        await against(RANKS, count // 5, folder, figures)
        await beyond_the_limit(folder, figures)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="about how many (100)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begin = time.monotonic()
    figures = asyncio.run(run(arguments.faults, arguments.seed))
    figures.show(time.monotonic() - begin)
    raise SystemExit(1 if figures.lost else 0)


if __name__ == "__main__":
    main()
