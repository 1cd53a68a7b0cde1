"""The engine in a process of its own: ``python -m vllm_di.containers.engine_process SOCKET``, with
``replacement`` before it for one that takes the place of an engine that was ready.

The assembly comes on standard input. The first of two connections to the socket is
for the heartbeat. One thread reads requests, the main thread runs the engine.
The process ends when the socket does, or with a last message when the engine fails.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

from vllm_di.components.heartbeat import Beat, Heart
from vllm_di.components.interfaces import Engine
from vllm_di.components.messages import EngineOutputs, TokenOutput
from vllm_di.components.transport import Codec, Connection, Failure, connect
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.checks import Checked, Checks
from vllm_di.containers.fill import Launcher, open_engine
from vllm_di.errors import EngineDeadError, RequestError
from vllm_di.logs import configure_child
from vllm_di.progress import shown
from vllm_di.server import wire
from vllm_di.server.sharing import Borrower

IDLE_SECONDS = 1.0
"""Seconds between two checks of the workers by an idle engine."""
Inbox = queue.SimpleQueue[wire.ToEngine | Checked | None]
log = logging.getLogger(__name__)


def main() -> None:
    # an interrupt at the keyboard reaches the whole group: the API process decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assembly = Assembly.decode(sys.stdin.buffer.read())
    name = "engine" if assembly.replica is None else f"engine {assembly.replica}"
    configure_child(assembly.log_format, name, level=logging.WARNING)  # the API process says stages
    codec: Codec[wire.ToEngine] = Codec(wire.ToEngine)
    try:
        heart = Heart(sys.argv[-1])
        connection = Connection(connect(sys.argv[-1]), codec)
    except (FileNotFoundError, ConnectionRefusedError):
        sys.exit(1)  # the API process is gone already: it could not be built
    failed = False
    try:
        given = {}
        if sys.argv[1:-1] == [wire.REPLACEMENT]:
            given["launcher"] = Launcher(assembly, is_replacement=True)
        connection.send(wire.Stage("load"))
        with ExitStack() as stack:
            with shown(lambda text: tell_stage(connection, text)):
                engine = stack.enter_context(open_engine(assembly, **given))
            pulse = Pulse(engine)
            heart.state = pulse.beat
            connection.send(wire.Ready(engine.report, engine.patience))
            serve(engine, connection, pulse)
    except BrokenPipeError:
        return  # the API process is gone
    except Exception as error:
        failed = True
        connection.send(Failure.of(error))
    finally:
        connection.close()
    sys.exit(1 if failed else 0)


def tell_stage(connection: Connection[wire.ToEngine], text: str) -> None:
    """Tell the peer which stage the start has reached. A peer that is gone is noticed by the next
    message."""
    with contextlib.suppress(OSError):
        connection.send(wire.Stage(text))


class Pulse:
    """The content of the engine heartbeat."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._began: float | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Marks the engine as busy inside the block."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    def beat(self) -> Beat:
        began = self._began
        busy = 0.0 if began is None else time.monotonic() - began
        return Beat(busy, self._engine.processes())


def serve(engine: Engine, connection: Connection[wire.ToEngine], pulse: Pulse) -> None:
    """Run until the peer closes."""
    inbox: Inbox = queue.SimpleQueue()
    borrower, checks = Borrower(), Checks(engine, inbox.put)
    threading.Thread(target=_read, args=(connection, inbox), name="requests", daemon=True).start()
    while True:
        messages = _drain(inbox, wait=not engine.has_work())
        if not messages and not engine.has_work():
            engine.check_alive()
            continue
        refused = []
        for message in messages:
            if message is None:
                return
            if isinstance(message, wire.Add | Checked):
                request_id = message.request.request_id
                try:
                    if isinstance(message, Checked):
                        if checks.end(message):
                            engine.add(message.request)
                    elif not checks.begin(request := borrower.request(message)):
                        engine.add(request)
                except RequestError as error:
                    refused.append(_refusal(request_id, error))
            elif isinstance(message, wire.Abort):
                checks.abort(message.request_id)
                engine.abort(message.request_id)
            elif isinstance(message, wire.Keep):
                borrower.keep(message)
            elif isinstance(message, wire.Drop):
                borrower.drop(message)
            else:
                engine.reset_prefix_cache()
        with pulse.step():
            outputs = engine.step()
        if refused or outputs.outputs or messages:
            answer = EngineOutputs(outputs=[*refused, *outputs.outputs], stats=outputs.stats)
            connection.send(wire.Outputs(answer))


def _read(connection: Connection[wire.ToEngine], inbox: Inbox) -> None:
    """Until the peer closes, or says what cannot be read: nobody would hear what follows."""
    try:
        while True:
            inbox.put(connection.receive())
    except (EngineDeadError, OSError):
        pass
    except Exception:
        log.exception("a message of the API process cannot be read: the engine ends")
    finally:
        inbox.put(None)


def _drain(inbox: Inbox, *, wait: bool) -> list[wire.ToEngine | Checked | None]:
    """All messages that have arrived; with ``wait`` returns none only after ``IDLE_SECONDS``."""
    messages: list[wire.ToEngine | Checked | None] = []
    try:
        if wait:
            messages.append(inbox.get(timeout=IDLE_SECONDS))
        while True:
            messages.append(inbox.get_nowait())
    except queue.Empty:
        return messages


def _refusal(request_id: str, error: RequestError) -> TokenOutput:
    return TokenOutput(
        request_id=request_id,
        finish_reason="error",
        error=error.message,
        error_param=error.param,
        error_code=error.code,
        error_status=error.status,
    )


if __name__ == "__main__":
    main()
