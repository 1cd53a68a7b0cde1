"""Devices, layouts and communicators with a flaw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_di.components.communicator.torch_distributed import TorchDistributedCommunicator
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import DeviceMemory, LayerCache
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.messages import KvSpec


class WrongBytes(HostDevice):
    """Never says that anything was taken."""

    def memory(self) -> DeviceMemory:
        total = super().memory().total
        return DeviceMemory(total, total)


class FreeAboveTotal(HostDevice):
    def memory(self) -> DeviceMemory:
        found = super().memory()
        return DeviceMemory(found.total + 1, found.total)


class DtypeCast(HostDevice):
    """Takes float32 for what it lacks."""

    def dtype(self, name: str) -> torch.dtype:
        try:
            return super().dtype(name)
        except ValueError:
            return torch.float32


class ThreadsKept(HostDevice):
    """Forgets to restore torch's number of threads."""

    def close(self) -> None:
        pass


class PadWritten(HndLayout):
    """Writes padding to the last slot."""

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        last = cache.key.shape[0] * self.block_size - 1
        super().write(cache, k, v, torch.where(slot_mapping < 0, last, slot_mapping))


class HalfTheBytes(HndLayout):
    def bytes_per_block(self, specs: Sequence[KvSpec], dtype: torch.dtype) -> int:
        return super().bytes_per_block(specs, dtype) // 2


class OffsetWrong(HndLayout):
    """Takes the last slot of a block for its first."""

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        size = self.block_size
        last = slot_mapping % size == size - 1
        super().write(cache, k, v, torch.where(last, slot_mapping - size + 1, slot_mapping))


class SwappedRanks(TorchDistributedCommunicator):
    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        found = super().all_gather(x, dim)
        return torch.cat(found.chunk(self.world_size, dim)[::-1], dim)


class NoReduce(TorchDistributedCommunicator):
    """The sum reaches the first rank alone."""

    def all_reduce(self, x: Tensor) -> Tensor:
        total = super().all_reduce(x.clone())
        return total if self.rank == 0 else x


class DeathUnnoticed(TorchDistributedCommunicator):
    """Goes on with its own numbers when a peer is gone."""

    def all_reduce(self, x: Tensor) -> Tensor:
        try:
            return super().all_reduce(x)
        except Exception:
            return x
