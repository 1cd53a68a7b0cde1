"""The API process's connection to the engine process. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence

from vllm_di.components.messages import EngineRequest, TokenOutput
from vllm_di.components.transport import Codec, Failure
from vllm_di.errors import EngineDeadError, RequestError, VllmDiError
from vllm_di.server import wire
from vllm_di.server.client_state import StatefulClient
from vllm_di.server.engine_watch import EngineProcess
from vllm_di.server.sharing import Lender

RESTART_SECONDS = 600.0
"""The limit of restarts counts those within this time."""
ENGINE = (sys.executable, "-m", "vllm_di.containers.engine_process")

log = logging.getLogger(__name__)


class ProcessEngineClient(StatefulClient):
    """Starts the engine process and shares one socket among all requests.

    ``start`` returns at once; ``wait_ready`` waits for the weights. When the process dies, every
    open request gets an EngineDeadError at once. An engine that was ready is then replaced, up to
    ``restarts`` times in ten minutes: ``state`` is ``starting`` meanwhile, and ``dead`` where there
    is no other.
    """

    def __init__(self, name: str = "", *, last_words: str = "the server ends") -> None:
        """``name`` stands before its log lines, ``last_words`` behind that of its last death."""
        super().__init__()
        self._name, self._last_words = f"{name}: " if name else "", last_words
        self.on_change: Callable[[], None] | None = None
        """Called after each change of state, stage or silence."""
        self.on_death: Callable[[], None] | None = None
        """Called when an engine has ended, before its requests learn of it."""
        self._replacing = False
        self._codec: Codec[wire.ToClient] = Codec(wire.ToClient)
        self._lender = Lender()
        self._inboxes: dict[str, asyncio.Queue[TokenOutput | VllmDiError]] = {}
        self._engine: EngineProcess | None = None
        self._deaths: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self, assembly: bytes, command: Sequence[str] = ENGINE) -> None:
        """Start the engine process and send it the assembly."""
        self._engine = await EngineProcess.spawn(command, assembly)
        self._task = asyncio.create_task(self._run(command, assembly))

    async def replace(self) -> None:
        """End the engine and start a new one: that counts as no death. Requests that it still has
        get an EngineDeadError. An engine that is being replaced already is waited for."""
        assert self._engine is not None
        if self.state == "ready":
            self._replacing = True
            self._engine.hang_up()
        while self._replacing or self.state == "starting":
            await self._change.wait()

    @property
    def pid(self) -> int:
        """Of the engine process."""
        assert self._engine is not None
        return self._engine.pid

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        self._check_ready()
        request_id = request.request_id
        if request_id in self._inboxes:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        inbox = self._inboxes[request_id] = asyncio.Queue()
        finished = False
        lender = self._lender
        try:
            for message in lender.messages(request):
                self._send(message)
            while not finished:
                output = await inbox.get()
                if isinstance(output, VllmDiError):
                    finished = True
                    raise output
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._inboxes[request_id]
            if not finished:
                self._send(wire.Abort(request_id))
            unused = list(lender.end(request_id))
            if lender is self._lender:  # else the engine that had it is gone
                for message in unused:
                    self._send(message)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._engine is not None:
            await self._engine.close()

    # -- inside -------------------------------------------------------------------------------

    def _send(self, message: wire.ToEngine) -> None:
        assert self._engine is not None
        self._engine.send(self._codec.frame(message))

    async def _run(self, command: Sequence[str], assembly: bytes) -> None:
        """Run the engine, and a new one after each death, until no restart is left."""
        assert self._engine is not None
        error = await self._serve(self._engine)
        while self._may_restart(error):
            await self._engine.close()
            try:
                self._engine = await EngineProcess.spawn(command, assembly, wire.REPLACEMENT)
            except OSError as failure:
                error = EngineDeadError(f"no new engine process can be started: {failure}")
            else:
                error = await self._serve(self._engine)
        await self._engine.close()

    async def _serve(self, engine: EngineProcess) -> VllmDiError:
        """Handle messages until the process ends; return why it did."""
        watching: asyncio.Task[None] | None = None
        self._lender = Lender()  # a new engine has nothing stored
        try:
            await engine.accept()
            watching = asyncio.create_task(engine.watch(self._on_silence))
            while True:
                self._take(self._codec.decode(await engine.receive()), engine)
        except (asyncio.IncompleteReadError, ConnectionError):
            error: VllmDiError = await engine.ending()
        except VllmDiError as failure:
            error = failure
        except Exception as failure:
            log.error("a message of the engine could not be handled", exc_info=failure)
            error = EngineDeadError(f"{type(failure).__name__}: {failure}")
        finally:
            if watching is not None:
                watching.cancel()
        return error

    def _take(self, message: wire.ToClient, engine: EngineProcess) -> None:
        if isinstance(message, wire.Outputs):
            if self.on_stats is not None:
                self.on_stats(message.outputs.stats)
            for output in message.outputs.outputs:
                inbox = self._inboxes.get(output.request_id)
                if inbox is not None:
                    inbox.put_nowait(output)
        elif isinstance(message, wire.Stage):
            prefix = "restart: " if self._deaths else ""
            self.stage = prefix + message.name
            self._changed()
        elif isinstance(message, wire.Ready):
            self.report, engine.patience = message.report, message.patience
            self.state, self.stage, self.failure, self._error = "ready", "ready", None, None
            self._settled.set()
            self._changed()
        elif isinstance(message, Failure):
            error = message.error()
            raise error if isinstance(error, VllmDiError) else EngineDeadError(str(error))

    def _on_silence(self, silent: Sequence[str]) -> None:
        """``silent``: the processes without a heartbeat, after a change."""
        if silent:
            log.warning("%sno heartbeat from %s", self._name, ", ".join(silent))
        elif self.silent:
            log.warning("%sheartbeat again from %s", self._name, ", ".join(self.silent))
        self.silent = silent
        self._changed()

    def _changed(self) -> None:
        super()._changed()
        if self.on_change is not None:
            self.on_change()

    def _may_restart(self, error: VllmDiError) -> bool:
        """Fail all requests in flight. Whether to restart: not if the engine was never ready."""
        was_ready, num_open = self.state == "ready", len(self._inboxes)
        replacing, self._replacing = self._replacing, False
        if replacing:
            error = EngineDeadError("the engine is being replaced")
        now = time.monotonic()
        self._deaths = [t for t in self._deaths if now - t < RESTART_SECONDS]
        will_restart = self.report is not None and len(self._deaths) < self.restarts
        will_restart = will_restart or replacing
        if was_ready and not will_restart:
            reason = f"{error}; no restart is left (server.engine_restarts={self.restarts} in "
            error = EngineDeadError(f"{reason}{RESTART_SECONDS / 60:.0f} minutes)")
        if not replacing:
            self._deaths.append(now)
        self.state, self.failure = "starting" if will_restart else "dead", str(error)
        self.silent = ()
        self.stage = "restart" if will_restart else "dead"
        self._error = None if will_restart else error
        failure = error if isinstance(error, EngineDeadError) else EngineDeadError(str(error))
        if self.on_death is not None:
            self.on_death()
        for inbox in self._inboxes.values():
            inbox.put_nowait(failure)
        if replacing:
            log.warning("%sthe engine is replaced", self._name)
        elif was_ready:
            what = "a new engine starts" if will_restart else self._last_words
            fate = "in flight" if self._name else "lost"
            died = "%sthe engine died: %s. Requests %s: %d; %s"
            log.error(died, self._name, error, fate, num_open, what)
        if not will_restart:
            self._settled.set()
            self._dead.set()
        self._changed()
        return will_restart
