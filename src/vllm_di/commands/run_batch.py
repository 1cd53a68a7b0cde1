"""``vllm-di run-batch FILE``: answer the requests of a file in OpenAI's batch form. They take the
server's routes, in this process: nothing listens."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from vllm_di.commands.arguments import Arguments, UsageError
from vllm_di.commands.engines import start_engine
from vllm_di.commands.say import say, warn
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.errors import ConfigError, EngineDeadError
from vllm_di.server.replicas import ReplicatedEngineClient

CONCURRENCY = 256
"""Requests at once, where --concurrency does not say: the scheduler takes what fits."""
_KEYS = ("unix_socket", "api_key_file", "api_key_env")
_OF_LISTENING: dict[str, Any] = {"host": "127.0.0.1", "tls": {}, **dict.fromkeys(_KEYS)}
"""Keys of the server that say who may reach it, and where."""


def run(arguments: Arguments) -> int:
    """Exit status 0 also where some requests failed: their lines say why."""
    if len(arguments.words) != 1:
        raise UsageError("one FILE of requests is expected, or - for standard input")
    concurrency = arguments.number("--concurrency", CONCURRENCY)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with ExitStack() as files:
        source = _opened(arguments.words[0], files)
        assembly = assemble(arguments.overrides, arguments.config_dirs)
        warn(assembly.warnings)
        target = _created(arguments.options.get("-o", "-"), arguments.words[0], files)
        num_lines, num_good = asyncio.run(_answer(assembly, source, target, concurrency))
    say(f"{num_lines} requests, {num_lines - num_good} of them failed")
    return 0


async def _answer(
    assembly: Assembly, source: BinaryIO, target: BinaryIO, concurrency: int
) -> tuple[int, int]:
    """-> lines, and those answered with 200. Raises EngineDeadError."""
    node = assembly.server["server"]
    node |= {key: value for key, value in _OF_LISTENING.items() if key in node}
    client = await start_engine(assembly)
    try:
        # imported while the engine process starts
        from vllm_di.containers.fill import opened
        from vllm_di.containers.slots import ServerContainer
        from vllm_di.server.app import OpenAiServer
        from vllm_di.server.batch import Batch

        with opened(ServerContainer, assembly, engine_client=client) as container:
            if isinstance(client, ReplicatedEngineClient):
                client.router = container.router()
            server = container.server()
            if not isinstance(server, OpenAiServer):
                raise ConfigError(
                    f"server: {type(server).__qualname__} has no routes that a file could take; "
                    "run-batch needs server=openai"
                )
            await client.wait_ready()
            batch = Batch(server.app, server.batch_urls, concurrency=concurrency)
            num_lines = num_good = 0
            async for result in batch.run(source):
                target.write(msgspec.json.encode(result) + b"\n")
                target.flush()
                num_lines, num_good = num_lines + 1, num_good + result.is_good
                if client.state == "dead":
                    raise EngineDeadError(f"{client.failure}; {num_lines} results were written")
            return num_lines, num_good
    finally:
        await client.close()


def _opened(name: str, files: ExitStack) -> BinaryIO:
    if name == "-":
        return sys.stdin.buffer
    try:
        return files.enter_context(Path(name).open("rb"))
    except OSError as error:
        raise UsageError(f"{name}: the requests cannot be read: {error.strerror}") from None


def _created(name: str, source: str, files: ExitStack) -> BinaryIO:
    if name == "-":
        return sys.stdout.buffer
    if source != "-" and Path(name).exists() and Path(name).samefile(source):
        raise UsageError(f"-o {name}: the results would take the place of the requests")
    try:
        return files.enter_context(Path(name).open("wb"))
    except OSError as error:
        raise UsageError(f"-o {name}: the results cannot be written: {error.strerror}") from None
