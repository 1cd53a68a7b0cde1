"""``vllm-di bench serve``: requests to a running server over HTTP, as clients send them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from vllm_di.commands.arguments import Arguments, UsageError
from vllm_di.errors import VllmDiError

START_SECONDS = 600
STREAMED = {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
VOCABULARY = 256
"""Prompts are drawn from ids that every model has."""


@dataclass
class Timing:
    """One request: seconds from its start to each token."""

    tokens: list[float] = field(default_factory=list)
    failed: str | None = None

    def came(self, seconds: float, count: int) -> None:
        """So many tokens have come by now, of those before. Several in one event share the time
        since the last: text may be held back until a character is whole."""
        more = count - len(self.tokens)
        last = self.tokens[-1] if self.tokens else seconds
        self.tokens += [last + (seconds - last) * i / more for i in range(1, more + 1)]


def measure(arguments: Arguments) -> dict[str, list[float]]:
    """Starts a server as users do, unless --base-url names one on this machine."""
    base = arguments.options.get("--base-url")
    if base is not None:
        return asyncio.run(_rounds(base, arguments))
    with server(arguments) as address:
        return asyncio.run(_rounds(address, arguments))


@contextlib.contextmanager
def server(arguments: Arguments) -> Iterator[str]:
    """The address of a server with these overrides, which ends with the ``with`` block."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "vllm_di.cli", "serve", *arguments.overrides]
    command += [w for d in arguments.config_dirs for w in ("--config-dir", d)]
    process = subprocess.Popen([*command, f"server.port={port}"], stderr=subprocess.PIPE, text=True)
    try:
        asyncio.run(_until_ready("127.0.0.1", port, process))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate()


async def _until_ready(host: str, port: int, process: subprocess.Popen[str]) -> None:
    begin = time.perf_counter()
    while time.perf_counter() - begin < START_SECONDS:
        if process.poll() is not None:
            _, errors = process.communicate()
            lines = errors.strip().splitlines() or ["no message"]
            raise VllmDiError(f"the server did not start: {lines[-1]}")
        with contextlib.suppress(OSError, ValueError, IndexError):
            if (await request(host, port, "GET", "/readyz"))[0] == 200:
                return
        await asyncio.sleep(0.1)
    raise VllmDiError(f"the server was not ready after {START_SECONDS} s")


async def _rounds(base: str, arguments: Arguments) -> dict[str, list[float]]:
    parts = urlsplit(base)
    if parts.scheme != "http" or parts.hostname is None:
        raise UsageError(f"--base-url: expected http://HOST:PORT, got {base!r}")
    host, port = parts.hostname, parts.port or 80
    model = await model_name(host, port)
    repeats, seed = arguments.number("--repeats", 3), arguments.number("--seed", 0, least=0)
    figures: dict[str, list[float]] = {}
    warmup = arguments.number("--warmup", 1, least=0)
    for number in range(seed, seed + warmup + repeats):
        for name, value in (await _round(host, port, model, arguments, number)).items():
            figures.setdefault(name, []).append(value)
    return {name: values[-repeats:] for name, values in figures.items()}


async def _round(
    host: str, port: int, model: str, arguments: Arguments, number: int
) -> dict[str, float]:
    """All requests once: at most ``concurrency`` at a time, begun at ``request-rate`` a second."""
    from vllm_di.commands.bench import prompts

    count = arguments.number("--num-prompts", 64)
    given = arguments.number("--input-len", 128)
    wanted = arguments.number("--output-len", 64)
    rate = arguments.real("--request-rate", 0.0)
    gate = asyncio.Semaphore(arguments.number("--concurrency", 16))
    bodies = [
        {
            "model": model,
            "prompt": ids,
            "max_tokens": wanted,
            "temperature": 0,
            "ignore_eos": True,
        }
        for ids in prompts(count, given, VOCABULARY, number)
    ]

    async def one(place: int, body: dict[str, object]) -> Timing:
        if rate:
            await asyncio.sleep(place / rate)
        async with gate:
            timing = Timing()
            await stream(host, port, body, timing)
            return timing

    begin = time.perf_counter()
    timings = await asyncio.gather(*(one(i, body) for i, body in enumerate(bodies)))
    seconds = time.perf_counter() - begin
    failures = [t.failed for t in timings if t.failed]
    if failures:
        raise VllmDiError(f"{len(failures)} of {count} requests failed; the first: {failures[0]}")
    first = sorted(t.tokens[0] for t in timings)
    between = sorted(b - a for t in timings for a, b in zip(t.tokens, t.tokens[1:], strict=False))
    whole = sorted(t.tokens[-1] for t in timings)
    figures = {
        "requests/s": count / seconds,
        "generated tokens/s": count * wanted / seconds,
    }
    for name, values in (("first token", first), ("between tokens", between), ("whole", whole)):
        if values:
            for share in (50, 90, 99):
                figures[f"{name} p{share}, ms"] = 1e3 * values[(len(values) - 1) * share // 100]
    return figures


async def request(host: str, port: int, method: str, path: str) -> tuple[int, bytes]:
    async with _connection(host, port) as (reader, writer):
        writer.write(_head(method, path, host, 0))
        answer = await reader.read()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def model_name(host: str, port: int) -> str:
    """What the server calls its model."""
    models = json.loads((await request(host, port, "GET", "/v1/models"))[1])
    return str(models["data"][0]["id"])


async def stream(host: str, port: int, body: dict[str, object], timing: Timing) -> None:
    """One streamed completion; fills ``timing`` with its events as they arrive."""
    payload = json.dumps(body | STREAMED).encode()
    begin = time.perf_counter()
    async with _connection(host, port) as (reader, writer):
        writer.write(_head("POST", "/v1/completions", host, len(payload)) + payload)
        status = int((await reader.readline()).split()[1])
        if status != 200:
            timing.failed = (
                f"HTTP {status}: {(await reader.read())[-300:].decode(errors='replace')}"
            )
            return
        async for line in reader:
            if line.startswith(b"data: {"):
                if b'"error"' in line[:20]:
                    timing.failed = line.decode(errors="replace").strip()
                    return
                seconds = time.perf_counter() - begin
                timing.came(seconds, json.loads(line[6:])["usage"]["completion_tokens"])
    if not timing.tokens:
        timing.failed = "no token came"


def _head(method: str, path: str, host: str, length: int) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


@contextlib.asynccontextmanager
async def _connection(
    host: str, port: int
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 22)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
