"""What runs in a process that Ray starts on a node. Only plain values cross to it and back: text,
numbers and bytes, in Ray's own serialisation."""

from __future__ import annotations

import importlib
import os
import pkgutil
import socket
import time
from hashlib import sha256
from typing import Any

import msgspec

from vllm_di.components.listening import Port, beyond, listening, processes_of
from vllm_di.components.transport import Failure
from vllm_di.errors import EngineDeadError
from vllm_di.version import __version__

CLAIM_SECONDS = 10.0
"""For the process of a worker that has just been ended to be gone."""


class NodeWorker:
    """A Ray actor with one worker in it. It says what is on its node, then ``run`` does not return
    until the engine hangs up."""

    def describe(self, address: str, resource: str, num_slots: int) -> dict[str, Any]:
        """Of a node with this IP address and so many parts of ``resource``: the version, Ray's
        ports that are open beyond it, and which part is this worker's: 0 where Ray hides the
        devices of others from this process."""
        ray = importlib.import_module("ray")
        context = ray.get_runtime_context()
        ports = ray_ports_beyond(address, context.get_session_name())
        found = {"version": __version__, "beyond": [str(port) for port in ports], "slot": 0}
        if not context.get_accelerator_ids().get(resource):
            mark = f"{context.get_node_id()} {resource}"
            self._slot, found["slot"] = claimed(mark, num_slots)
        return found

    def run(self, function: str, placement: bytes, assembly: bytes, line: bytes) -> bytes:
        """The worker of an ``Errand``. Returns nothing, or the Failure that kept it from the
        engine, as MessagePack."""
        try:
            pkgutil.resolve_name(function)(placement, assembly, line)
        except Exception as error:
            return msgspec.msgpack.encode(Failure.of(error))
        return b""


def claimed(mark: str, count: int) -> tuple[socket.socket, int]:
    """The lowest number below ``count`` that no other process of this host holds under ``mark``,
    and what holds it: a socket with an abstract name, free again when its process ends. So workers
    of several engines, which do not know of each other, share a node out. Raises EngineDeadError
    where all are held for ``CLAIM_SECONDS``."""
    end = time.monotonic() + CLAIM_SECONDS
    while True:
        for number in range(count):
            holder = socket.socket(socket.AF_UNIX)
            try:
                holder.bind(f"\0vllm-di {sha256(f'{mark} {number}'.encode()).hexdigest()}")
            except OSError:
                holder.close()
            else:
                return holder, number
        if time.monotonic() > end:
            raise EngineDeadError(f"all {count} parts of the node are held by others ({mark})")
        time.sleep(0.1)


def ray_ports_beyond(address: str, session: str) -> list[Port]:
    """Ports of a cluster's processes on this host that are open at more than the loopback and
    ``address``. ``session``: Ray's name of the cluster, in the command lines of what it starts."""
    found = beyond(listening(processes_of(session)), address)
    own = listening({os.getpid()})  # a driver's: Ray has a port in it too
    return found + [port for port in own if port in beyond(own, address) and port not in found]
