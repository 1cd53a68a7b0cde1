"""Starts, watches and ends the engine process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence

from vllm_di.components import heartbeat
from vllm_di.components.heartbeat import Beat, Silence
from vllm_di.components.transport import Rendezvous, read_frame
from vllm_di.errors import EngineDeadError

CLOSE_SECONDS = 10.0
END_SECONDS = 2.0
"""Time for a process to end after it closed its connection."""
ENGINE = "engine"
"""Its name in messages."""


class EngineProcess:
    """One engine process. Call ``accept``, then ``receive`` and ``watch``, then ``close``."""

    def __init__(self, process: asyncio.subprocess.Process, rendezvous: Rendezvous) -> None:
        self._process, self._rendezvous = process, rendezvous
        self._heart: asyncio.StreamReader | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._peers: dict[int, int] = {}
        """Process id to pidfd, for the processes that the engine started. A pidfd stays with its
        process even if the id is used again."""
        self.patience: float | None = None
        """Seconds without a heartbeat, or within a step, after which it is killed; None: never."""
        self._silence, self._beat = Silence(), Beat()
        self._kill_reason: str | None = None

    @classmethod
    async def spawn(cls, command: Sequence[str], assembly: bytes, *arguments: str) -> EngineProcess:
        """Start the process and send it the assembly. ``arguments``: before its socket's."""
        rendezvous = Rendezvous()
        try:
            process = await asyncio.create_subprocess_exec(
                *command, *arguments, rendezvous.address, stdin=asyncio.subprocess.PIPE
            )
        except BaseException:
            rendezvous.close()
            raise
        assert process.stdin is not None
        process.stdin.write(assembly)
        process.stdin.close()
        return cls(process, rendezvous)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def accept(self) -> None:
        """Accept the two connections of the process. Raises EngineDeadError if it ends before."""
        try:
            self._heart = await self._accept_one()
            self._reader = await self._accept_one()
        finally:
            self._rendezvous.close()

    async def receive(self) -> bytes:
        """The next message. Raises asyncio.IncompleteReadError or ConnectionError at the end."""
        return await read_frame(self._reader)

    def send(self, frame: bytes) -> None:
        """Drops the frame if the process is gone; ``receive`` raises then."""
        if len(self._writers) == 2 and not self._writers[1].is_closing():
            self._writers[1].write(frame)

    def hang_up(self) -> None:
        """Close its connections, so that it ends; ``receive`` raises then."""
        for writer in self._writers:
            writer.close()

    async def watch(self, on_silence: Callable[[Sequence[str]], None]) -> None:
        """Follow the heartbeat until cancelled. Calls ``on_silence`` with the names of the silent
        processes after each change. Kills the process when a step, or the silence, takes longer
        than ``patience``."""
        following = asyncio.create_task(self._follow())
        reported: tuple[str, ...] = ()
        try:
            while self._kill_reason is None:
                await asyncio.wait((following,), timeout=heartbeat.INTERVAL)
                if following.done():
                    return  # the process is gone: ``receive`` raises
                self._silence.tick()
                silent = tuple(p.name for p in self._beat.peers if p.silent)
                if self._silence.is_long:
                    silent = (ENGINE,)
                if silent != reported:
                    reported = silent
                    on_silence(reported)
                await self._check(self.patience)
        finally:
            following.cancel()

    async def ending(self) -> EngineDeadError:
        """Why the process closed its connection."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), END_SECONDS)
        code = self._process.returncode
        if self._kill_reason is not None:
            how = f"{self._kill_reason} and was killed"
        elif code is None:
            how = "closed its connection"
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        return EngineDeadError(f"the engine process {how}")

    async def close(self) -> None:
        """End the process: close its socket, then SIGTERM, then SIGKILL. Processes that it started
        and left are killed."""
        self._rendezvous.close()
        self.hang_up()
        for end in (None, self._process.terminate, self._process.kill):
            with contextlib.suppress(ProcessLookupError):
                if end is not None:
                    end()
            try:
                await asyncio.wait_for(self._process.wait(), CLOSE_SECONDS)
            except TimeoutError:
                continue
            break
        for descriptor in self._peers.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
        self._peers = {}

    # -- inside -------------------------------------------------------------------------------

    async def _accept_one(self) -> asyncio.StreamReader:
        loop = asyncio.get_running_loop()
        self._rendezvous.socket.setblocking(False)
        accepting = asyncio.ensure_future(loop.sock_accept(self._rendezvous.socket))
        ended = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait((accepting, ended), return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                raise EngineDeadError(
                    f"the engine process ended with exit status {self._process.returncode} at its "
                    "start"
                )
            sock, _ = accepting.result()
        finally:
            accepting.cancel()
            ended.cancel()
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        self._writers.append(writer)
        return reader

    async def _follow(self) -> None:
        """Handle heartbeats until the process is gone."""
        assert self._heart is not None
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self._beat = heartbeat.CODEC.decode(await read_frame(self._heart))
                self._silence.beat()
                for peer in self._beat.peers:
                    if peer.pid and peer.pid not in self._peers:
                        with contextlib.suppress(ProcessLookupError):
                            self._peers[peer.pid] = os.pidfd_open(peer.pid)

    async def _check(self, limit: float | None) -> None:
        if limit is None:
            return
        if self._silence.seconds > limit:
            self._kill_reason = f"gave no sign of life for {limit:g} s"
        elif self._beat.busy > limit:
            self._kill_reason = f"took more than {limit:g} s for a step"
        else:
            return
        await asyncio.to_thread(heartbeat.put_down, self._process.send_signal)
