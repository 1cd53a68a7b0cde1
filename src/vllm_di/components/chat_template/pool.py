"""Starts the render processes, and sends them jobs."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading

import msgspec

from vllm_di.components.chat_template.frames import LENGTH, Answer, Job, Setup, frame
from vllm_di.errors import ConfigError, RequestError

_CHILD = "vllm_di.components.chat_template.child"
_SILENCE_SECONDS = 60.0
"""A process that neither answers nor reaches its CPU limit (stopped, starved) is killed then."""
_CHUNK = 2**20

log = logging.getLogger(__name__)


class RenderPool:
    """``count`` processes; one that ends is replaced. Any thread may call ``render``.

    Raises ConfigError when a template does not compile.
    """

    def __init__(self, setup: Setup, count: int) -> None:
        self._setup = setup
        self._closed = False
        self._workers = [_Worker(setup) for _ in range(count)]
        # last in, first out: one process stays warm in the caches
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        try:
            for worker in self._workers:
                worker.start()
            answer = self._workers[0].compiled()
        except _Ended as error:
            self.close()
            why = f"compiling the template takes more than {setup.cpu_seconds:g} s of CPU time"
            raise ConfigError(
                why if error.is_out_of_time else f"the render process ended: {error}"
            ) from None
        except OSError as error:
            self.close()
            raise ConfigError(f"no render process can be started: {error}") from None
        if answer.error is not None:
            self.close()
            raise ConfigError(answer.error)

    def render(self, job: Job) -> str:
        """Render in a free process; blocks until there is one. Raises RequestError."""
        try:
            request = frame(job)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RequestError(
                f"these values cannot be passed to the chat template: {error}", param="messages"
            ) from None
        worker = self._idle.get()
        try:
            answer = self._ask(worker, request)
        finally:
            self._idle.put(worker)
        if answer.refusal is not None:
            raise RequestError(
                f"the chat template refuses these messages: {answer.refusal}", param="messages"
            )
        if answer.error is not None:
            raise RequestError(
                f"the chat template cannot render these messages: {answer.error}", param="messages"
            )
        return answer.text

    def close(self) -> None:
        """End the processes; a render in progress fails. May be called twice."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        for _ in self._workers:  # close pipes only when no thread waits on them
            with contextlib.suppress(queue.Empty):
                self._idle.get(timeout=5).end()
        for worker in self._workers:
            self._idle.put(worker)

    def _ask(self, worker: _Worker, request: bytes) -> Answer:
        """Ask; once more if the process dies, which need not be the fault of the request."""
        for is_last in (False, True):
            if self._closed:
                raise RequestError("the server is stopping", code="shutting_down", status=503)
            try:
                return worker.ask(request)
            except _Ended as error:
                if self._closed:
                    continue
                log.warning("a render process ended: %s; starting a new one", error)
                with contextlib.suppress(OSError):  # the next request tries again
                    worker.start()
                if error.is_out_of_time:
                    raise RequestError(
                        "the chat template takes more than "
                        f"{self._setup.cpu_seconds:g} s of CPU time for these messages",
                        param="messages",
                    ) from None
                if is_last:
                    raise RequestError(
                        f"the render process ended twice: {error}",
                        param="messages",
                    ) from None
            except OSError as error:
                raise RequestError(
                    f"no render process can be started: {error}", status=503
                ) from None
        raise RequestError("the server is stopping", code="shutting_down", status=503)


class _Ended(Exception):
    """The process ended. ``code``: its ``Popen.returncode``."""

    def __init__(self, code: int) -> None:
        super().__init__(f"signal {-code}" if code < 0 else f"exit code {code}")
        self.is_out_of_time = code == -signal.SIGPROF


class _Worker:
    """One process. Not thread-safe, except for ``kill``."""

    def __init__(self, setup: Setup) -> None:
        self._setup = frame(setup)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._compiled: Answer | None = None

    def start(self) -> None:
        """Start a process and send it the templates. Does not wait for it. Raises OSError."""
        self.end()
        command = [sys.executable, "-P", "-m", _CHILD]
        with self._lock:
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0)
            self._process = process
        self._compiled = None
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        with contextlib.suppress(_Ended):  # `ask` reports it
            self._write(process, self._setup)

    def compiled(self) -> Answer:
        """The answer to the templates. Raises _Ended."""
        assert self._process is not None
        if self._compiled is None:
            self._compiled = self._read(self._process)
        return self._compiled

    def ask(self, request: bytes) -> Answer:
        """Raises _Ended, or OSError when no process can be started."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        self.compiled()
        assert self._process is not None
        self._write(self._process, request)
        return self._read(self._process)

    def kill(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def end(self) -> None:
        """Kill the process, if any, and close its pipes."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _write(self, process: subprocess.Popen[bytes], data: bytes) -> None:
        assert process.stdin is not None
        file = process.stdin.fileno()
        left = memoryview(data)
        try:
            while left:
                self._wait(process, file, select.POLLOUT)
                left = left[os.write(file, left[:_CHUNK]) :]
        except BrokenPipeError:
            raise _Ended(process.wait()) from None

    def _read(self, process: subprocess.Popen[bytes]) -> Answer:
        (length,) = LENGTH.unpack(self._read_exactly(process, LENGTH.size))
        return msgspec.msgpack.decode(self._read_exactly(process, length), type=Answer)

    def _read_exactly(self, process: subprocess.Popen[bytes], length: int) -> bytes:
        assert process.stdout is not None
        file = process.stdout.fileno()
        data = bytearray()
        while len(data) < length:
            self._wait(process, file, select.POLLIN)
            chunk = os.read(file, min(length - len(data), _CHUNK))
            if not chunk:
                raise _Ended(process.wait())
            data += chunk
        return bytes(data)

    def _wait(self, process: subprocess.Popen[bytes], file: int, event: int) -> None:
        poll = select.poll()
        poll.register(file, event)
        if not poll.poll(_SILENCE_SECONDS * 1000):
            process.kill()
            raise _Ended(process.wait())
