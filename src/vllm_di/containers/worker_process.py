"""A worker in a process of its own: ``python -m vllm_di.containers.worker_process PLACEMENT
SOCKET``.

The placement is JSON, the assembly comes on standard input. Two connections go to the Unix socket:
the first for the heartbeat, the second for commands. The process ends when they do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from contextlib import ExitStack

import msgspec

from vllm_di.components.executor import rpc
from vllm_di.components.heartbeat import Heart
from vllm_di.components.interfaces import Placement, Worker
from vllm_di.components.transport import Codec, Connection, Failure, connect
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.fill import open_worker
from vllm_di.progress import print_line, shown


def main() -> None:
    placement = msgspec.json.decode(sys.argv[1], type=Placement)
    # an interrupt at the keyboard reaches the whole group: the executor decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Heart(sys.argv[2])
    assembly = Assembly.decode(sys.stdin.buffer.read())
    codec: Codec[rpc.Command] = Codec(rpc.Command)
    connection = Connection(connect(sys.argv[2]), codec)
    try:
        with ExitStack() as stack:
            with shown(print_line):
                worker = stack.enter_context(open_worker(assembly, placement))
            connection.send(rpc.Hello(placement.rank, placement.stage))
            serve(worker, connection)
    except Exception as error:
        with contextlib.suppress(OSError):  # the executor may be gone
            connection.send(Failure.of(error))
        sys.stdout.flush()
        os._exit(1)  # peers may be waiting in a collective: do not wait for them
    finally:
        connection.close()


def serve(worker: Worker, connection: Connection[rpc.Command]) -> None:
    """Answer commands until Close."""
    while True:
        command = connection.receive()
        if isinstance(command, rpc.Execute):
            connection.send(rpc.Result(worker.execute(command.step)))
        elif isinstance(command, rpc.Load):
            connection.send(rpc.Report(worker.load()))
        elif isinstance(command, rpc.Prepare):
            connection.send(rpc.Size(worker.prepare(command.groups)))
        elif isinstance(command, rpc.Allocate):
            worker.allocate(command.num_blocks)
            connection.send(rpc.Done())
        else:
            return


if __name__ == "__main__":
    main()
