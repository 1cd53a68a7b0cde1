"""``vllm-di serve``: the API process. It starts the engine process first, so that both start side
by side."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from vllm_di.commands.arguments import EXIT_USAGE, Arguments, no_words
from vllm_di.commands.engines import start_engine
from vllm_di.commands.say import say, warn
from vllm_di.components.interfaces import EngineClient
from vllm_di.components.messages import WorkerReport
from vllm_di.components.warm_ups import shown
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.errors import ConfigError, VllmDiError
from vllm_di.logs import JSON, held_back
from vllm_di.server.replicas import ReplicatedEngineClient
from vllm_di.server.sockets import check_address

log = logging.getLogger(__name__)


def run(arguments: Arguments) -> int:
    """Serve until a signal. Errors of the engine's start end here too."""
    no_words(arguments)
    with held_back() as held:
        assembly = assemble(arguments.overrides, arguments.config_dirs)
        held.format = assembly.log_format
    if assembly.log_format == JSON:
        return _serve_with_json(assembly, arguments.config_dirs)
    warn(assembly.warnings)
    asyncio.run(_serve(assembly, arguments.config_dirs, say))
    return 0


def _serve_with_json(assembly: Assembly, config_dirs: Sequence[str]) -> int:
    """All that is said is a log line, errors that end the server too."""
    log.setLevel(logging.INFO)
    for text in assembly.warnings:
        log.warning("%s", text)
    try:
        asyncio.run(_serve(assembly, config_dirs, lambda text: log.info("%s", text)))
    except VllmDiError as error:
        log.critical("%s", error)
        return EXIT_USAGE if isinstance(error, ConfigError) else 1
    return 0


async def _serve(
    assembly: Assembly, config_dirs: Sequence[str], tell: Callable[[str], None]
) -> None:
    _check_address(assembly.server["server"])
    client = await start_engine(assembly)
    try:
        # imported while the engine process starts
        from vllm_di.containers.fill import opened
        from vllm_di.containers.overview import overview
        from vllm_di.containers.slots import ServerContainer
        from vllm_di.server.app import OpenAiServer

        with opened(ServerContainer, assembly, engine_client=client) as container:
            server = container.server()

            def address() -> str | None:
                return server.address if isinstance(server, OpenAiServer) else None

            watching = asyncio.create_task(_announce(assembly, client, address, tell))
            try:
                if isinstance(client, ReplicatedEngineClient):
                    client.router = container.router()
                    _replace_on_signal(client, assembly.server["server"])
                if isinstance(server, OpenAiServer):  # one of another class has its own paths
                    server.show_assembly(partial(overview, assembly, config_dirs))
                await server.run()
            finally:
                watching.cancel()
                await _quietly(watching)
    finally:
        await client.close()


def _replace_on_signal(client: ReplicatedEngineClient, server: dict[str, Any]) -> None:
    """SIGUSR1: drain and replace one replica after the other. A server of another class may have
    other keys."""
    patience = server.get("drain_seconds", 30.0)
    running: set[asyncio.Task[None]] = set()

    def replace() -> None:
        if running:
            return log.warning("the replicas are being replaced already")
        task = asyncio.create_task(client.replace_all(patience))
        running.add(task)
        task.add_done_callback(running.discard)
        return None

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, replace)


def _check_address(server: dict[str, Any]) -> None:
    """Notice a taken address before the engine starts. Wrong types are found later, with their
    place, and a server of another class may have other keys."""
    values: list[Any] = [server.get(key) for key in ("host", "port", "unix_socket")]
    host, port, path = values
    is_known = isinstance(host, str) and isinstance(port, int) and isinstance(path, str | None)
    if is_known and port in range(2**16):
        check_address(host, port, path)


async def _announce(
    assembly: Assembly,
    client: EngineClient,
    address: Callable[[], str | None],
    tell: Callable[[str], None],
) -> None:
    """Say what starts, how far it is, and where it listens; again for an engine that follows one
    that died."""
    server = assembly.server["server"]
    tell(f"model {assembly.settings['model_name']}, {assembly.announcement}")
    stage = ""
    while client.state != "dead":
        if client.stage != stage:
            stage = client.stage
            if client.state == "ready" and client.report is not None:
                tell(_ready(client.report))
                if replicas := client.replicas():
                    tell(
                        f"{len(replicas)} replicas of that, requests by router={_router(assembly)}"
                    )
                tell(f"listening on {_where(server, address())} (API under /v1)")
            else:
                tell(f"engine: {_STAGES.get(stage, stage)}")
        await asyncio.sleep(0.1 if client.state == "starting" else 1.0)


_STAGES = {"start": "starting", "load": "loading weights"}
"""``EngineClient.stage`` to words."""


def _router(assembly: Assembly) -> str:
    return assembly.choices["router"].option


def _where(server: dict[str, Any], address: str | None) -> str:
    """``address``: where it listens indeed, which differs from the config's for port 0. A server of
    another class may have other keys."""
    if path := server.get("unix_socket"):
        return str(path)
    if address is not None:
        return address
    if "host" in server and "port" in server:
        scheme = "https" if (server.get("tls") or {}).get("cert") else "http"
        return f"{scheme}://{server['host']}:{server['port']}"
    return f"an address of its own ({server['_target_']})"


def _ready(report: WorkerReport) -> str:
    tokens = report.num_blocks * report.block_size
    warm_up = f", warm-up {shown(report.warm_up)}" if report.warm_up is not None else ""
    return (
        f"ready: {report.dtype} weights of {report.weight_bytes / 2**20:.0f} MiB, "
        f"KV cache for {tokens} tokens" + warm_up
    )


async def _quietly(task: asyncio.Task[Any] | Coroutine[Any, Any, Any]) -> None:
    await asyncio.gather(task, return_exceptions=True)
