"""``torch.hpu``, which lacks some of what other modules of torch have."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_di.components.device.simulated import Simulation
from vllm_di.components.device.torch_device import TorchDevice
from vllm_di.components.interfaces import DeviceMemory, Placement
from vllm_di.errors import ConfigError, PortError
from vllm_di.ports.hpu.vendor import is_lazy

LAZY_MODE = "PT_HPU_LAZY_MODE"
"""Environment variable that Habana's package reads when it is imported."""


class HpuDevice(TorchDevice):
    """``lazy``: the package records operations until ``mark_step``; else it runs each at once.

    Raises ConfigError where the package was imported in the other mode before.
    """

    def __init__(
        self,
        placement: Placement | None = None,
        *,
        package: str,
        install: str,
        index: int | None,
        memory_budget: str | int | None,
        dtypes: list[str],
        default_dtype: str,
        lazy: bool,
        simulated: bool,
        simulation: Simulation | None = None,
    ) -> None:
        os.environ[LAZY_MODE] = str(int(lazy))
        if not simulated:
            try:
                importlib.import_module(f"{package}.torch")  # registers torch.hpu
            except ImportError as error:
                if error.name != package:  # a package that is absent is named below
                    raise PortError(f"hpu: {package}.torch: {error}; {install}") from error
        super().__init__(
            placement,
            backend="hpu",
            package=package,
            runtime=None,
            install=install,
            index=index,
            memory_budget=memory_budget,
            dtypes=dtypes,
            dtype_capability={},
            default_dtype=default_dtype,
            simulated=simulated,
            simulation=simulation,
        )
        if is_lazy(self) is not lazy:
            raise ConfigError(
                f"lazy: {str(lazy).lower()}, but Habana's package was imported before with "
                f"{LAZY_MODE}={int(not lazy)}; set device.lazy={str(not lazy).lower()}, or start "
                f"with {LAZY_MODE}={int(lazy)} in the environment"
            )
        self.lazy = lazy

    def memory(self) -> DeviceMemory:
        """As the driver sees it: torch.hpu does not say what it holds without using it."""
        free, total = self._module.mem_get_info(self._index)
        if self._budget is None:
            return DeviceMemory(free, total)
        used = self._module.memory_allocated(self._index)
        return DeviceMemory(max(0, min(free, self._budget - used)), self._budget)

    def host_zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Not pinned: copies go through the vendor's own buffers."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def close(self) -> None:
        """torch.hpu has no cache to hand back."""

    def _hold_to(self, budget: int) -> None:
        """The budget sizes the KV cache; torch.hpu refuses nothing beyond it."""
        total = self._module.mem_get_info(self._index)[1]
        if budget > total:
            raise ConfigError(f"memory_budget: {budget} bytes, but hpu has {total}; lower it")
