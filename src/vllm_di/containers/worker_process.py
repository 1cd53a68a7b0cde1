"""A worker in a process of its own: ``python -m vllm_di.containers.worker_process PLACEMENT
SOCKET``.

The placement is JSON, the assembly comes on standard input. Two connections go to the Unix socket:
the first for the heartbeat, the second for calls. The process ends when they do. On a node of a
cluster ``run_on_node`` is called in a process that is there already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
from contextlib import ExitStack
from typing import Any

import msgspec

from vllm_di.components.executor import rpc
from vllm_di.components.heartbeat import Heart
from vllm_di.components.interfaces import DEFAULT_ROLE, Placement, Worker
from vllm_di.components.lines import Line, descriptor
from vllm_di.components.remote import RemoteMethods
from vllm_di.components.transport import Connection, Failure, connect
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.fill import open_worker
from vllm_di.errors import RequestError
from vllm_di.logs import JSON, configure_child
from vllm_di.progress import print_line, shown


def main() -> None:
    placement = msgspec.json.decode(sys.argv[1], type=Placement)
    # an interrupt at the keyboard reaches the whole group: the executor decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Heart(sys.argv[2])
    assembly = Assembly.decode(sys.stdin.buffer.read())
    run(assembly, placement, connect(sys.argv[2]))


def run_on_node(placement: bytes, assembly: bytes, line: bytes) -> None:
    """The worker of an ``Errand``, in this process: connections go over ``line``, JSON of a
    ``Line``. Ends the process where the worker fails. Raises ConfigError or OSError where the
    engine cannot be reached."""
    place = msgspec.json.decode(placement, type=Placement)
    way = msgspec.json.decode(line, type=Line)
    Heart(way.connect())
    if place.node is not None and place.world_size > 1:
        store = descriptor(way.connect())
        place = dataclasses.replace(place, node=dataclasses.replace(place.node, store=store))
    run(Assembly.decode(assembly), place, way.connect())


def run(assembly: Assembly, placement: Placement, sock: socket.socket) -> None:
    """Open the worker's container, then answer calls that come over ``sock`` until it closes."""
    configure_child(assembly.log_format, _name(placement, assembly))
    connection = Connection(sock, rpc.GREETING)
    try:
        with ExitStack() as stack:
            with shown(_ignore if assembly.log_format == JSON else print_line):
                worker = stack.enter_context(open_worker(assembly, placement))
            serve(worker, placement, connection)
    except Exception as error:
        with contextlib.suppress(OSError):  # the executor may be gone
            connection.send(Failure.of(error))
        sys.stdout.flush()
        os._exit(1)  # peers may be waiting in a collective: do not wait for them
    finally:
        connection.close()


def serve(worker: Worker, placement: Placement, connection: Connection[Any]) -> None:
    """Say hello, then answer calls until Close. A wrong call is refused; an error of the worker
    itself is raised."""
    methods = RemoteMethods(type(worker))
    codec = rpc.commands(methods)
    called = {m.command: (m, getattr(worker, m.name)) for m in methods}
    connection.send(rpc.Hello(placement.rank, placement.stage))
    while True:
        try:
            command = codec.decode(connection.receive_payload())
        except msgspec.ValidationError as error:
            connection.send(_refused(RequestError(f"a worker cannot read a call: {error}")))
            continue
        if isinstance(command, rpc.Close):
            return
        method, function = called[type(command)]
        try:
            answer = method.done(function(*msgspec.structs.astuple(command)))
        except RequestError as error:
            answer = _refused(error)
        try:
            connection.send(answer)
        except (TypeError, OverflowError) as error:  # no plain data
            connection.send(_refused(method.broken(error)))


def _name(placement: Placement, assembly: Assembly) -> str:
    """For log lines: ``worker 1``, with what tells it from others."""
    of_engine = "" if assembly.replica is None else f" of engine {assembly.replica}"
    role = "" if placement.role == DEFAULT_ROLE else f"{placement.role} "
    stage = f", stage {placement.stage}" if placement.num_stages > 1 else ""
    return f"{role}worker {placement.rank}{stage}{of_engine}"


def _ignore(_line: str) -> None:
    """The line is a log record, which the root logger has written."""


def _refused(error: Exception) -> rpc.Refused:
    return rpc.Refused(Failure.of(error))


if __name__ == "__main__":
    main()
