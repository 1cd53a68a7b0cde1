"""The host's own processor and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from vllm_di.components.device import system
from vllm_di.components.device.sizes import parse_size
from vllm_di.components.interfaces import Device, DeviceMemory, Placement
from vllm_di.errors import ConfigError
from vllm_di.kernels.memory import huge_zeros

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""CPU flags under which products of bfloat16 are native (``bf16`` is Arm's)."""


class HostDevice(Device):
    """Threads, memory and dtypes of the CPU. The ranks of all replicas share the host: each takes
    its part.

    Sets torch's number of threads, and the cores of the thread that builds it, which those it
    starts inherit; restores both on close. Raises ConfigError for cores that this process may not
    use, or fewer than ranks.
    """

    torch_device = torch.device("cpu")
    on_host = True
    supported_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32, torch.float16)

    def __init__(
        self,
        placement: Placement | None = None,
        *,
        threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None,
        memory_budget: str | int | None,
        default_dtype: str,
        cores: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None,
    ) -> None:
        placement = placement or Placement()
        self._ranks = placement.host_world_size
        self._cores_before = system.pin(_own(cores, placement)) if cores is not None else None
        self._budget = None if memory_budget is None else parse_size(memory_budget, "memory_budget")
        self._base = system.resident_bytes()
        self.default_dtype = torch.bfloat16 if BF16_FLAGS & system.cpu_flags() else torch.float32
        if default_dtype != "auto":
            self.default_dtype = self.dtype(default_dtype)
        self._threads_before = torch.get_num_threads()
        part = 1 if cores is not None else self._ranks  # those left are this rank's alone
        usable = system.usable_cores()
        is_shared = placement.num_replicas > 1 and placement.node is None
        if part > usable and is_shared and threads is None:
            raise ConfigError(
                f"executor.data_parallel_size={placement.num_replicas}: {part} workers in all, "
                f"and {usable} cores that this process may use; each needs one. Lower it, or set "
                "device.threads where they are to share cores"
            )
        torch.set_num_threads(threads or max(1, usable // part))

    def memory(self) -> DeviceMemory:
        """This rank's part of the declared budget, or of what the system says is available."""
        if self._budget is not None:
            total = self._budget // self._ranks
            used = max(0, system.resident_bytes() - self._base)
            return DeviceMemory(max(0, total - used), total)
        free, total = system.memory()
        return DeviceMemory(free // self._ranks, total // self._ranks)

    def synchronize(self) -> None:
        """Work on the host is done when its call returns."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return huge_zeros(shape, dtype)

    def close(self) -> None:
        torch.set_num_threads(self._threads_before)
        if self._cores_before is not None:
            system.pin(self._cores_before)


def _own(cores: Sequence[int], placement: Placement) -> list[int]:
    """This rank's part of the cores that are given for all ranks."""
    allowed = system.allowed_cores()
    for core in cores:
        if core not in allowed:
            raise ConfigError(
                f"cores: {core} is not among those that this process may use: "
                f"{', '.join(map(str, allowed))}"
            )
    rank, ranks = placement.host_rank, placement.host_world_size
    if len(cores) < ranks:
        who = f"{ranks} ranks"
        if placement.num_replicas > 1:
            who += f" (executor.data_parallel_size={placement.num_replicas} among them)"
        raise ConfigError(f"cores: {len(cores)} for {who}; each needs one at least")
    return list(cores[len(cores) * rank // ranks : len(cores) * (rank + 1) // ranks])
