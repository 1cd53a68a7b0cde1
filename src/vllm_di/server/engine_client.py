"""The API process's line to the engine process. No torch on this side."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence

from vllm_di.components.interfaces import EngineClient
from vllm_di.components.messages import EngineRequest, TokenOutput, WorkerReport
from vllm_di.components.transport import Codec, Failure, Rendezvous, read_frame
from vllm_di.errors import EngineDeadError, RequestError, VllmDiError
from vllm_di.server import wire

CLOSE_SECONDS = 10.0
ENGINE = (sys.executable, "-m", "vllm_di.containers.engine_process")


class ProcessEngineClient(EngineClient):
    """Starts the engine process and shares one socket among all requests.

    ``start`` returns at once; ``wait_ready`` waits for the weights. When the process dies, every
    open request gets an EngineDeadError and ``state`` is ``dead`` at once.
    """

    def __init__(self) -> None:
        self.state = "starting"
        self.failure: str | None = None
        self.stage = "start"
        self.report: WorkerReport | None = None
        self._error: VllmDiError | None = None
        self._codec: Codec[wire.ToClient] = Codec(wire.ToClient)
        self._inboxes: dict[str, asyncio.Queue[TokenOutput | VllmDiError]] = {}
        self._settled = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, assembly: bytes, command: Sequence[str] = ENGINE) -> None:
        """Start the process and send it the assembly."""
        self._rendezvous = Rendezvous()
        self._process = await asyncio.create_subprocess_exec(
            *command, self._rendezvous.address, stdin=asyncio.subprocess.PIPE
        )
        assert self._process.stdin is not None
        self._process.stdin.write(assembly)
        self._process.stdin.close()
        self._task = asyncio.create_task(self._run(self._process))

    async def wait_ready(self) -> None:
        await self._settled.wait()
        if self._error is not None:
            raise self._error

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        if self.state != "ready":
            raise self._error or EngineDeadError(f"the engine is not ready: {self.stage}")
        request_id = request.request_id
        if request_id in self._inboxes:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        inbox = self._inboxes[request_id] = asyncio.Queue()
        finished = False
        try:
            self._send(wire.Add(request))
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

    async def close(self) -> None:
        """End the engine process: closing the socket asks it to, a signal tells it, another makes
        it."""
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            for signal in (None, self._process.terminate, self._process.kill):
                with contextlib.suppress(ProcessLookupError):
                    if signal is not None:
                        signal()
                try:
                    await asyncio.wait_for(self._process.wait(), CLOSE_SECONDS)
                except TimeoutError:
                    continue
                break
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # -- inside -------------------------------------------------------------------------------

    def _send(self, message: wire.ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(self._codec.frame(message))

    async def _run(self, process: asyncio.subprocess.Process) -> None:
        """Read until the process ends; then nobody waits for it any longer."""
        error: VllmDiError | None = None
        try:
            reader = await self._accept(process)
            while True:
                self._take(self._codec.decode(await read_frame(reader)))
        except (asyncio.IncompleteReadError, ConnectionError):
            error = self._error
        except VllmDiError as failure:
            error = failure
        if error is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 2)
            code = process.returncode
            how = (
                "closed its connection"
                if code is None
                else f"was killed by signal {-code}"
                if code < 0
                else f"ended with exit status {code}"
            )
            error = EngineDeadError(f"the engine process {how}")
        self._die(error)

    async def _accept(self, process: asyncio.subprocess.Process) -> asyncio.StreamReader:
        loop = asyncio.get_running_loop()
        self._rendezvous.socket.setblocking(False)
        accepting = asyncio.ensure_future(loop.sock_accept(self._rendezvous.socket))
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((accepting, ended), return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                raise EngineDeadError(
                    f"the engine process ended with exit status {process.returncode} at its start"
                )
            sock, _ = accepting.result()
        finally:
            accepting.cancel()
            ended.cancel()
            self._rendezvous.close()
        reader, self._writer = await asyncio.open_unix_connection(sock=sock)
        return reader

    def _take(self, message: wire.ToClient) -> None:
        if isinstance(message, wire.Outputs):
            if self.on_stats is not None:
                self.on_stats(message.outputs.stats)
            for output in message.outputs.outputs:
                inbox = self._inboxes.get(output.request_id)
                if inbox is not None:
                    inbox.put_nowait(output)
        elif isinstance(message, wire.Stage):
            self.stage = message.name
        elif isinstance(message, wire.Ready):
            self.report = message.report
            self.state, self.stage = "ready", "ready"
            self._settled.set()
        elif isinstance(message, Failure):
            error = message.error()
            raise error if isinstance(error, VllmDiError) else EngineDeadError(str(error))

    def _die(self, error: VllmDiError) -> None:
        self.state, self.failure, self._error = "dead", str(error), error
        self.stage = "dead"
        for inbox in self._inboxes.values():
            lost = error if isinstance(error, EngineDeadError) else EngineDeadError(str(error))
            inbox.put_nowait(lost)
        self._settled.set()
