"""Memory under load: ``python -m tests.rigs.soak``, or ``make soak``.

A server with a tiny model answers tens of thousands of mixed requests, some refused and some
broken off, on the loopback. Memory may grow while caches fill; once it rests, the API process and
the engine's must stay within ``MOST`` bytes a request. Exit status 1 where one does not, where an
answer is lost, or where the canary changes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.rigs.server import RigServer

MOST = 100
"""Resident bytes that a request may leave behind, once memory rests."""
WINDOW = 5_000
"""Requests between two looks at the memory."""
REST_WINDOWS = 8
"""Windows in which memory must come to rest: until then caches may fill."""
CLIENTS = 16
BLOCKS = 256
"""Of the KV cache: few, so that the prefix cache is full before memory is judged."""
WORDS = ("once", "upon", "a", "time", "there", "was", "no", "leak", "at", "all")
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 5, "presence_penalty": 0.5},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0.5, "n": 2},
    {"temperature": 0, "stop": ["zz", "q"]},
    {"temperature": 0, "logit_bias": {"65": 1.5}, "min_tokens": 1},
)


class Client:
    """One connection, kept alive; a request that is broken off takes a new one."""

    def __init__(self, port: int, seed: int, counts: Counter[str]) -> None:
        self._port, self._counts = port, counts
        self._chance = random.Random(seed)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def requests(self, count: int) -> None:
        """Send so many, one after the other. Raises AssertionError for a lost answer."""
        for _ in range(count):
            draw = self._chance.random()
            if draw < 0.04:
                await self._refused()
            elif draw < 0.08:
                await self._broken_off()
            else:
                await self._answered(chat=draw < 0.3, stream=draw > 0.8)
        await self.close()

    async def close(self) -> None:
        if self._streams:
            self._streams[1].close()
            await self._streams[1].wait_closed()
            self._streams = None

    # -- kinds of requests --------------------------------------------------------------------

    async def _answered(self, *, chat: bool, stream: bool) -> None:
        body = self._body()
        if chat:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            if "logprobs" in body:
                body |= {"logprobs": True, "top_logprobs": 2}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        status, answer = await self._ask(path, body | ({"stream": True} if stream else {}))
        assert status == 200, f"{path} answered {status}: {answer[:300]!r}"
        assert (b"[DONE]" if stream else b"choices") in answer, answer[-300:]
        self._counts["stream" if stream else "chat" if chat else "completion"] += 1

    async def _refused(self) -> None:
        status, _ = await self._ask("/v1/completions", self._body() | {"top_p": 7})
        assert status == 400, f"top_p=7 got {status}"
        self._counts["refused"] += 1

    async def _broken_off(self) -> None:
        """The client goes away in the middle of an answer."""
        body = self._body() | {"stream": True, "max_tokens": 64, "ignore_eos": True}
        reader, writer = await self._connection()
        writer.write(_message("/v1/completions", body))
        await reader.readline()
        await self.close()
        self._counts["broken off"] += 1

    # -- HTTP -----------------------------------------------------------------------------------

    def _body(self) -> dict[str, Any]:
        words = self._chance.choices(WORDS, k=self._chance.randrange(1, 12))
        most = self._chance.randrange(1, 6)
        return {"prompt": " ".join(words), "max_tokens": most, **self._chance.choice(SAMPLING)}

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        return self._streams

    async def _ask(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        reader, writer = await self._connection()
        writer.write(_message(path, body))
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").lower().split("\r\n")
        headers = dict(line.partition(": ")[::2] for line in lines[1:] if line)
        if "content-length" in headers:
            content = await reader.readexactly(int(headers["content-length"]))
        else:
            content = b""
            while size := int(await reader.readline(), 16):
                content += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        if headers.get("connection") == "close":
            await self.close()
        return int(lines[0].split()[1]), content


def _message(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def resident(pid: int) -> int:
    """Bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no VmRSS")


async def load(port: int, requests: int, seed: int, counts: Counter[str]) -> None:
    clients = [Client(port, seed + n, counts) for n in range(CLIENTS)]
    shares = [requests // CLIENTS + (n < requests % CLIENTS) for n in range(CLIENTS)]
    await asyncio.gather(*(c.requests(s) for c, s in zip(clients, shares, strict=True)))


def growth(before: dict[str, int], after: dict[str, int], requests: int) -> dict[str, float]:
    """Bytes a request, of each process."""
    return {name: (after[name] - before[name]) / requests for name in before}


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak")
    parser.add_argument("--requests", type=int, default=50_000, help="judged ones")
    parser.add_argument("--window", type=int, default=WINDOW, help="requests between two looks")
    parser.add_argument("overrides", nargs="*", help="of the server, such as platform=cpu")
    chosen = parser.parse_args()
    counts: Counter[str] = Counter()
    begin = time.monotonic()
    with RigServer([f"worker.num_blocks={BLOCKS}", *chosen.overrides]) as server:
        (engine,) = server.engines
        pids = {"API process": server.process.pid, "engine process": engine}

        def look() -> dict[str, int]:
            return {name: resident(pid) for name, pid in pids.items()}

        seed, windows, rests = 0, 0, False
        while not rests and windows < REST_WINDOWS:
            before = look()
            asyncio.run(load(server.port, chosen.window, seed, counts))
            slopes = growth(before, look(), chosen.window)
            seed, windows = seed + CLIENTS, windows + 1
            rests = all(slope < MOST for slope in slopes.values())
            print(f"  until rest: window {windows}: {_figures(slopes)}", flush=True)
        before, done = look(), 0
        while done < chosen.requests:
            count = min(chosen.window, chosen.requests - done)
            asyncio.run(load(server.port, count, seed, counts))
            seed, done = seed + CLIENTS, done + count
            print(f"  {done} requests: {_figures(growth(before, look(), done))}", flush=True)
        slopes = growth(before, look(), done)
        assert server.canary() == server.expected, "the canary has changed"
        for name, pid in pids.items():
            print(f"{name}: {resident(pid) / 2**20:.0f} MiB, {slopes[name]:.1f} bytes a request")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    seconds = time.monotonic() - begin
    print(f"{done} requests judged of {counts.total()} in {seconds:.0f} s: {kinds}")
    worst = max(slopes.values())
    if worst >= MOST:
        print(f"FAILED: {worst:.0f} bytes a request; at most {MOST} are allowed", file=sys.stderr)
    return int(worst >= MOST)


def _figures(slopes: dict[str, float]) -> str:
    return ", ".join(f"{name} {slope:.1f} bytes a request" for name, slope in slopes.items())


if __name__ == "__main__":
    sys.exit(main())
