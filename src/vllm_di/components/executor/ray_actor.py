"""What runs in a process that Ray starts on a node. Only plain values cross to it and back: text,
numbers and bytes, in Ray's own serialisation."""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import Any

import msgspec

from vllm_di.components.listening import Port, beyond, listening, processes_of
from vllm_di.components.transport import Failure
from vllm_di.version import __version__


class NodeWorker:
    """A Ray actor with one worker in it. It says what is on its node, then ``run`` does not return
    until the engine hangs up."""

    def describe(self, address: str, resource: str) -> dict[str, Any]:
        """Of a node with this IP address: versions, Ray's ports that are open beyond it, and
        whether this process sees no device of ``resource`` but its own."""
        ray = importlib.import_module("ray")
        context = ray.get_runtime_context()
        seen, session = context.get_accelerator_ids(), context.get_session_name()
        return {
            "version": __version__,
            "beyond": [str(port) for port in ray_ports_beyond(address, session)],
            "sees_own": bool(seen.get(resource)),
        }

    def run(self, function: str, placement: bytes, assembly: bytes, line: bytes) -> bytes:
        """The worker of an ``Errand``. Returns nothing, or the Failure that kept it from the
        engine, as MessagePack."""
        try:
            pkgutil.resolve_name(function)(placement, assembly, line)
        except Exception as error:
            return msgspec.msgpack.encode(Failure.of(error))
        return b""


def ray_ports_beyond(address: str, session: str) -> list[Port]:
    """Ports of a cluster's processes on this host that are open at more than the loopback and
    ``address``. ``session``: Ray's name of the cluster, in the command lines of what it starts."""
    found = beyond(listening(processes_of(session)), address)
    own = listening({os.getpid()})  # a driver's: Ray has a port in it too
    return found + [port for port in own if port in beyond(own, address) and port not in found]
