"""The simulated device's collectives: gloo, on the device tensors' own memory."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def register(backend: str, device: str) -> None:
    """Make ``backend`` a distributed backend of ``device``'s tensors, once in a process."""
    if not dist.is_backend_available(backend):
        dist.Backend.register_backend(backend, SimulatedGroup, devices=[device])


class SimulatedGroup(dist.ProcessGroup):
    """Every collective runs on the host's views of the tensors, so that results land in place."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the overload for subclasses
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "simulated"

    # torch overloads these with shorter forms, which its own functions do not use

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        return self._gloo.allreduce(_hosts(tensors), *_given(opts))

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        return self._gloo.broadcast(_hosts(tensors), *_given(opts))

    def allgather(  # type: ignore[override]
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> Any:
        return self._gloo.allgather([_hosts(o) for o in outputs], _hosts(inputs), *_given(opts))

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        return self._gloo.send(_hosts(tensors), rank, tag)

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        return self._gloo.recv(_hosts(tensors), rank, tag)

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier()


def _given(opts: Any) -> tuple[Any, ...]:
    return () if opts is None else (opts,)


def _hosts(tensors: list[Tensor]) -> list[Tensor]:
    """The same memory as host tensors; host tensors as they are."""
    return [torch.ops.vllm_di_simulated.host_view(tensor) for tensor in tensors]
