"""An accelerator that torch speaks to through a module of its own: ``torch.cuda``, ``torch.xpu``,
``torch.npu``, ``torch.hpu``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.device.simulated import Simulation
from vllm_di.components.device.sizes import parse_size
from vllm_di.components.interfaces import Device, DeviceMemory, Placement
from vllm_di.errors import ConfigError, PortError, nearest


class TorchDevice(Device):
    """One device of ``torch.<backend>``; the ranks, over all replicas, take
    one each in order unless ``index`` says otherwise.

    Raises PortError when the package, the build of torch or the driver is absent: the message says
    which, why, and how to install it. Nothing else is ever taken in its place, but where
    ``simulated`` asks for the port's ``simulation``.
    """

    def __init__(
        self,
        placement: Placement | None = None,
        *,
        backend: str,
        package: str | None,
        runtime: str | None,
        install: str,
        index: int | None,
        memory_budget: str | int | None,
        dtypes: list[str],
        dtype_capability: dict[str, float],
        default_dtype: str,
        simulated: bool = False,
        simulation: Simulation | None = None,
    ) -> None:
        budget = None if memory_budget is None else parse_size(memory_budget, "memory_budget")
        named = {name: _dtype(name) for name in dtypes}
        if simulated:
            backend, self._module = _simulated(simulation, backend)
        else:
            self._module = available_module(backend, package, runtime, install)
        self._index = self._choose(placement or Placement(), index, backend)
        self._module.set_device(self._index)
        self.torch_device = torch.device(backend, self._index)
        self._lacking = self._beyond_capability(dtype_capability)
        self.supported_dtypes = tuple(d for name, d in named.items() if name not in self._lacking)
        if not self.supported_dtypes:
            raise ConfigError(f"dtypes: {', '.join(dtypes) or 'none'}: {self._name()} has none")
        self.default_dtype = self.supported_dtypes[0]
        if default_dtype != "auto":
            self.default_dtype = self.dtype(default_dtype)
        self._budget = budget
        if budget is not None:
            self._hold_to(budget)

    def memory(self) -> DeviceMemory:
        """What torch holds but does not use counts as free. With a budget, ``total`` is the budget
        and ``free`` what this process has left of it, never more than the device has."""
        free, total = self._module.mem_get_info(self._index)
        used = self._module.memory_allocated(self._index)
        free += self._module.memory_reserved(self._index) - used
        if self._budget is None:
            return DeviceMemory(free, total)
        return DeviceMemory(max(0, min(free, self._budget - used)), self._budget)

    def synchronize(self) -> None:
        self._module.synchronize(self._index)

    def host_zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """In pinned memory: copies from it need not wait."""
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def mark(self) -> Callable[[], None]:
        event = self._module.Event()
        event.record()
        wait: Callable[[], None] = event.synchronize
        return wait

    def dtype(self, name: str) -> torch.dtype:
        if name in self._lacking:
            raise ConfigError(
                f"dtype {name!r} needs compute capability {self._lacking[name]:g}, and "
                f"{self._name()} has {self._capability():g}; choose auto, "
                + ", ".join(str(d).removeprefix("torch.") for d in self.supported_dtypes)
            )
        return super().dtype(name)

    def close(self) -> None:
        """Hand cached memory back to the driver, and the budget: it is the process's, and the next
        device here has its own."""
        self._module.empty_cache()
        if self._budget is not None:
            self._module.set_per_process_memory_fraction(1.0, self._index)

    def _choose(self, placement: Placement, index: int | None, backend: str) -> int:
        count: int = self._module.device_count()
        if index is not None and placement.num_replicas > 1:
            raise ConfigError(
                f"index: {index} for executor.data_parallel_size={placement.num_replicas}: each "
                "replica has devices of its own; leave it null"
            )
        chosen = placement.host_rank if index is None else index
        if not 0 <= chosen < count:
            who = f"rank {placement.rank}" if index is None else "index"
            if placement.num_replicas > 1:
                who += f" of replica {placement.replica} (executor.data_parallel_size)"
            raise ConfigError(f"{who}: there is no {backend}:{chosen}; this machine has {count}")
        return chosen

    def _beyond_capability(self, needed: dict[str, float]) -> dict[str, float]:
        """Dtype to the compute capability that it needs and this device lacks."""
        if not needed:
            return {}
        has = self._capability()
        return {name: least for name, least in needed.items() if has < least}

    def _capability(self) -> float:
        major, minor = self._module.get_device_capability(self._index)
        return float(f"{major}.{minor}")

    def _name(self) -> str:
        return str(self._module.get_device_name(self._index))

    def _hold_to(self, budget: int) -> None:
        total = self._module.mem_get_info(self._index)[1]
        if budget > total:
            raise ConfigError(
                f"memory_budget: {budget} bytes, but {self._name()} has {total}; lower it"
            )
        # torch itself then refuses what goes beyond
        self._module.set_per_process_memory_fraction(budget / total, self._index)


def available_module(backend: str, package: str | None, runtime: str | None, install: str) -> Any:
    """``torch.<backend>``, once its package is imported and its driver answers. ``runtime`` is the
    entry of ``torch.version`` that must be set. Raises PortError."""
    if package is not None:
        try:
            importlib.import_module(package)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == package
            why = "is not installed" if missing else f"cannot be imported: {_first_line(error)}"
            raise PortError(f"{backend}: the package {package} {why}; {install}") from error
    module = getattr(torch, backend, None)
    if module is None:
        raise PortError(
            f"{backend}: torch {torch.__version__} has no module torch.{backend}; {install}"
        )
    if runtime is not None and not getattr(torch.version, runtime, None):
        raise PortError(
            f"{backend}: torch {torch.__version__} was built without {runtime}; {install}"
        )
    if not module.is_available():
        raise PortError(f"{backend}: no device can be used: {_reason(module)}; {install}")
    return module


def _simulated(simulation: Simulation | None, backend: str) -> tuple[str, Any]:
    """-> its name in torch, its module."""
    if simulation is None:
        raise ConfigError(
            f"simulated: {backend} has no simulation: its device has no node `simulation`"
        )
    name = simulation.name or backend
    return name, simulation.start(name)


def _reason(module: Any) -> str:
    """What the driver says when it is asked to start."""
    try:
        module.init()
    except Exception as error:  # whatever the vendor raises is the answer
        return _first_line(error)
    return f"{module.__name__}.is_available() is false"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        known = [n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype)]
        raise ConfigError(f"dtypes: {name!r} is no dtype of torch{nearest(name, known)}")
    return found
