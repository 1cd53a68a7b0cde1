"""The processes that render, as the API process sees them."""

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
"""After this a process that neither answers nor uses its CPU time (stopped, starved) is killed."""
_CHUNK = 2**20

log = logging.getLogger(__name__)


class RenderPool:
    """``count`` processes, started once; one that ends is replaced. Any thread may ask.

    Raises ConfigError where a template does not compile.
    """

    def __init__(self, setup: Setup, count: int) -> None:
        self._setup = setup
        self._closed = False
        self._workers = [_Worker(setup) for _ in range(count)]
        # last in, first out: one process stays warm
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        try:
            for worker in self._workers:
                worker.start()
            answer = self._workers[0].compiled()
        except _Ended as error:
            self.close()
            why = f"compiling it takes more than {setup.cpu_seconds:g} s of CPU time"
            raise ConfigError(
                why if error.is_out_of_time else f"the process that renders ended: {error}"
            ) from None
        except OSError as error:
            self.close()
            raise ConfigError(f"no process to render in: {error}") from None
        if answer.error is not None:
            self.close()
            raise ConfigError(answer.error)

    def render(self, job: Job) -> str:
        """Blocks until a process is free and has answered. Raises RequestError."""
        try:
            request = frame(job)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RequestError(
                f"the chat template cannot be given these values: {error}", param="messages"
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
        """End the processes; renders that run end with an error. May be called twice."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        for _ in self._workers:  # a worker's pipes are closed once no thread waits on them
            with contextlib.suppress(queue.Empty):
                self._idle.get(timeout=5).end()
        for worker in self._workers:
            self._idle.put(worker)

    def _ask(self, worker: _Worker, request: bytes) -> Answer:
        """Once more after a death that the request may have had no part in."""
        for is_last in (False, True):
            if self._closed:
                raise RequestError("the server is stopping", code="shutting_down", status=503)
            try:
                return worker.ask(request)
            except _Ended as error:
                if self._closed:
                    continue
                log.warning("a process that renders chat templates ended: %s; a new one", error)
                with contextlib.suppress(OSError):  # tried again by the next request
                    worker.start()
                if error.is_out_of_time:
                    raise RequestError(
                        "the chat template takes more than "
                        f"{self._setup.cpu_seconds:g} s of CPU time for these messages",
                        param="messages",
                    ) from None
                if is_last:
                    raise RequestError(
                        f"the process that renders the chat template ended twice: {error}",
                        param="messages",
                    ) from None
            except OSError as error:
                raise RequestError(
                    f"no process to render the chat template: {error}", status=503
                ) from None
        raise RequestError("the server is stopping", code="shutting_down", status=503)


class _Ended(Exception):
    """The process is gone. ``code``: as in ``Popen.returncode``."""

    def __init__(self, code: int) -> None:
        super().__init__(f"signal {-code}" if code < 0 else f"exit code {code}")
        self.is_out_of_time = code == -signal.SIGPROF


class _Worker:
    """One process. A single thread at a time uses it; ``kill`` alone may come from another."""

    def __init__(self, setup: Setup) -> None:
        self._setup = frame(setup)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._compiled: Answer | None = None

    def start(self) -> None:
        """Start a process and hand it the templates, without waiting for it. Raises OSError."""
        self.end()
        command = [sys.executable, "-P", "-m", _CHILD]
        with self._lock:
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0)
            self._process = process
        self._compiled = None
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        with contextlib.suppress(_Ended):  # `ask` finds out
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
