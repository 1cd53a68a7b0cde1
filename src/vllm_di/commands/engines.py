"""Starts the engine process of an assembly, or its replicas."""

from __future__ import annotations

from vllm_di.containers.assembly import Assembly
from vllm_di.server.engine_client import ProcessEngineClient
from vllm_di.server.replicas import ReplicatedEngineClient


async def start_engine(assembly: Assembly) -> ProcessEngineClient | ReplicatedEngineClient:
    """Returns at once: ``wait_ready`` waits. A replicated one wants a ``router``."""
    if assembly.num_replicas == 1:
        client = ProcessEngineClient()
        await client.start(assembly.encode())
        return client
    replicas = ReplicatedEngineClient(assembly.num_replicas)
    numbers = range(assembly.num_replicas)
    await replicas.start([assembly.of_replica(number).encode() for number in numbers])
    return replicas
