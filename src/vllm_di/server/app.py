"""The OpenAI-compatible server: the root of the API process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import closing

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from vllm_di.components.interfaces import (
    ChatTemplate,
    EngineClient,
    Metrics,
    ReasoningParser,
    Server,
    Tokenizer,
    ToolParser,
    Tracing,
)
from vllm_di.server.auth import ApiKeys
from vllm_di.server.config import ServerConfig
from vllm_di.server.cors import Cors
from vllm_di.server.errors import unavailable
from vllm_di.server.hosts import Hosts
from vllm_di.server.listen import Listener, quiet_accepts, signals
from vllm_di.server.middleware import RequestMiddleware
from vllm_di.server.observers import AccessLog, Observer, Tracer
from vllm_di.server.overview import Overview
from vllm_di.server.routes import on_http_exception, operations, routes
from vllm_di.server.service import Service
from vllm_di.server.sockets import listen
from vllm_di.server.tls import Tls

_LAST_WORDS_SECONDS = 2.0
"""Time for interrupted streams to send their error event."""

log = logging.getLogger(__name__)


class OpenAiServer(Server):
    """The OpenAI API over HTTP. ``app`` is the ASGI application; ``run`` listens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        tool_parser: ToolParser,
        reasoning_parser: ReasoningParser,
        metrics: Metrics,
        tracing: Tracing,
        engine_client: EngineClient,
        *,
        config: ServerConfig,
    ) -> None:
        keys = ApiKeys(file=config.api_key_file, env=config.api_key_env)
        config.check_exposure(has_keys=bool(keys))
        hosts = Hosts(config.allowed_hosts, is_open=not config.checks_hosts(has_keys=bool(keys)))
        logging.getLogger("vllm_di.server").setLevel(config.log_level.upper())
        self._config = config
        self._tls = _tls(config)
        self._engine = engine_client
        engine_client.on_stats = lambda stats: metrics.of(stats.replica).engine(stats)
        engine_client.restarts = config.engine_restarts
        self._service = Service(
            tokenizer,
            chat_template,
            tool_parser,
            reasoning_parser,
            metrics,
            engine_client,
            config,
            has_keys=bool(keys),
        )
        offered = operations(self._service, tokenizer_info=config.tokenizer_info)
        self.batch_urls = [one.path for one in offered if one.is_batch]
        """Paths that a line of a batch file may ask for."""
        endpoints = routes(offered)
        templates: dict[object, str] = {}
        for page in endpoints:  # an endpoint with several paths goes by the first
            templates.setdefault(page.endpoint, page.path)
        observers: list[Observer] = [AccessLog()] if config.access_log else []
        observers += [Tracer(tracing, config.name)] if tracing.records else []
        self.app = Starlette(
            routes=endpoints,
            middleware=[
                *([Middleware(Cors, origins=config.cors_origins)] if config.cors_origins else []),
                Middleware(
                    RequestMiddleware,
                    keys=keys,
                    hosts=hosts,
                    metrics=metrics,
                    handlers=templates,
                    observers=observers,
                ),
            ],
            exception_handlers={HTTPException: on_http_exception},
        )
        self.app.router.redirect_slashes = False
        self.address: str | None = None
        """Where the server listens, once it does."""
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    def show_assembly(self, overview: Callable[[], Overview] | None) -> None:
        """``overview`` is called in a thread when the page's ``/assembly`` is first asked for.
        Without one that path answers 404."""
        self._service.overview = overview

    def stop(self) -> None:
        """Start to drain; a second call ends all requests at once. SIGTERM and SIGINT call it. Call
        it from the event loop's thread only."""
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    async def run(self) -> None:
        """Listen at once, while the engine still starts; return after the drain. Raises ConfigError
        when the address is taken or cannot be bound, EngineDeadError when the engine does not
        start, or died and is not restarted."""
        config = self._config
        listener = Listener(self.app, config, self._tls)
        listening = listen(config.host, config.port, config.unix_socket, config.scheme)
        self.address = listening.address
        with closing(listening), signals(self.stop), quiet_accepts():
            serving = asyncio.create_task(listener.serve(sockets=[listening.socket]))
            starting = asyncio.create_task(self._start_engine())
            stopping = asyncio.create_task(self._stop.wait())
            log.info("listening on %s", self.address)
            try:
                await _first_to_end(stopping, serving, or_to_fail=starting)
                failed = [starting] if starting.done() else []  # during the drain: no failure
                await self._drain()
            finally:
                listener.should_exit = True
                for task in (starting, stopping):
                    task.cancel()
                await asyncio.gather(serving, starting, stopping, return_exceptions=True)
        for task in (*failed, serving):
            if not task.cancelled() and (error := task.exception()):
                raise error

    async def _start_engine(self) -> None:
        await self._engine.wait_ready()
        _ = self._service.processor  # records the engine's info metric
        log.info("ready: %s on %s", self._config.name, self.address)
        await self._engine.wait_dead()

    async def _drain(self) -> None:
        """Refuse new requests, give those in flight ``drain_seconds``, then interrupt them."""
        admission = self._service.admission
        admission.draining = True
        self._engine.restarts = 0
        log.info("stopping: %d choices in flight", admission.in_flight)
        idle = asyncio.create_task(admission.wait_idle())
        hurry = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait(
            (idle, hurry),
            timeout=self._config.drain_seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not idle.done():
            log.warning("aborting %d choices that are still running", admission.in_flight)
            admission.interrupt_all(
                unavailable(
                    "the server was stopped before the response was complete", "shutting_down"
                )
            )
            await asyncio.wait((idle,), timeout=_LAST_WORDS_SECONDS)
        for task in (idle, hurry):
            task.cancel()


def _tls(config: ServerConfig) -> Tls | None:
    """Raises ConfigError."""
    config.tls.check()
    if config.tls.cert is None:
        return None
    if config.unix_socket:
        log.warning("server.tls is for a TCP port: server.unix_socket speaks plain HTTP")
        return None
    return Tls(config.tls)


async def _first_to_end(*tasks: asyncio.Task[object], or_to_fail: asyncio.Task[None]) -> None:
    """Return when one of ``tasks`` has ended, or ``or_to_fail`` has failed."""
    waiting: set[asyncio.Task[object]] = {*tasks, or_to_fail}
    while True:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if done & {*tasks} or or_to_fail.exception():
            return
