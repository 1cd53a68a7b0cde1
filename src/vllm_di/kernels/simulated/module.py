"""``torch.<name>`` of the simulated device: what a vendor's package would register there."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.backend_registration import (
    generate_methods_for_privateuse1_backend,
    rename_privateuse1_backend,
)

from vllm_di.kernels.simulated import build, process_group
from vllm_di.kernels.simulated.graphs import SimulatedGraph, captured_into

Fault = Literal["out_of_memory", "hang", "nan", "death"]
FAULTS: tuple[Fault, ...] = ("out_of_memory", "hang", "nan", "death")

ONEDNN_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Compiled products that oneDNN and torch's binding of it keep, by shape: 1024 each, unless told
otherwise before their first use. Batches come in ever new shapes, and each costs megabytes."""

_installed: list[SimulatedModule] = []
"""At most one: torch gives PrivateUse1 one name in a process."""


class SimulatedModule(ModuleType):
    """Memory, synchronisation and faults of the devices of one process."""

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        super().__init__(f"torch.{name}")
        self.device = name
        self._limit, self._count = 0, 1
        self._capability: tuple[int, int] | None = None
        self._graph: SimulatedGraph | None = None
        """That is being captured."""
        self._library = library
        library.simulated_memory.restype = ctypes.c_int64
        library.simulated_operations.restype = ctypes.c_int64
        library.simulated_configure.argtypes = [ctypes.c_int64, ctypes.c_int]
        library.simulated_inject.argtypes = [ctypes.c_int, ctypes.c_int64]
        library.simulated_allow_host_operands.argtypes = [ctypes.c_char_p]

    # -- what TorchDevice, torch and torch.distributed ask a device's module ----------------------

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def init(self) -> None:
        """Nothing is left to start."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return self._count

    def current_device(self) -> int:
        return int(self._library.simulated_current())

    def set_device(self, device: Any) -> None:
        index = torch.device(self.device, device).index if isinstance(device, int) else device.index
        if self._library.simulated_set_current(index):
            raise RuntimeError(f"there is no {self.device}:{index}; there are {self._count}")

    def get_device_name(self, device: Any = None) -> str:
        return f"simulated {self.device}"

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        if self._capability is None:
            raise RuntimeError(f"simulated {self.device} has no compute capability")
        return self._capability

    def synchronize(self, device: Any = None) -> None:
        """An operation of its own, so that a hang or a death shows here as well."""
        torch.empty(0, dtype=torch.uint8, device=self.device)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """(free, total) bytes."""
        return max(0, self._limit - self.memory_allocated()), self._limit

    def memory_allocated(self, device: Any = None) -> int:
        """Bytes of all live storages."""
        return int(self._library.simulated_memory(0))

    def memory_reserved(self, device: Any = None) -> int:
        """Nothing is cached: freed memory is free at once."""
        return self.memory_allocated()

    def max_memory_allocated(self, device: Any = None) -> int:
        return int(self._library.simulated_memory(1))

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self._library.simulated_reset_peak()

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        self._library.simulated_configure(int(self._limit * fraction), self._count)

    def empty_cache(self) -> None:
        """There is none."""

    def manual_seed(self, seed: int) -> None:
        self.manual_seed_all(seed)

    def manual_seed_all(self, seed: int) -> None:
        """The device's random ops draw from the host's default generator."""
        torch.default_generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.default_generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    class Event:
        """Work on the host is done when its call returns."""

        def record(self, stream: Any = None) -> None: ...

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return True

    # -- graphs, and kernels that are launched -----------------------------------------------------

    CUDAGraph = SimulatedGraph
    XPUGraph = SimulatedGraph

    def graph_pool_handle(self) -> None:
        """Graphs share no memory."""

    @contextmanager
    def graph(self, graph: SimulatedGraph, pool: Any = None) -> Iterator[None]:
        """Capture what is done inside. Raises RuntimeError for what waits for the device."""
        self._graph = graph
        try:
            with captured_into(graph):
                yield
        finally:
            self._graph = None

    def launch(self, stand_in: Callable[..., None], grid: Any, arguments: Any, named: Any) -> None:
        """Run ``stand_in(grid, named, *arguments)`` in place of a kernel, on host tensors of the
        same memory. In a captured graph it is one node."""

        def run() -> None:
            view = torch.ops.vllm_di_simulated.host_view
            hosts = [view(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            stand_in(grid, named, *hosts)

        if self._graph is None:
            run()
            return
        with _disable_current_modes():
            run()
        self._graph.add(run)

    # -- what tests ask ----------------------------------------------------------------------------

    def configure(
        self, memory: int, devices: int, capability: tuple[int, int] | None = None
    ) -> None:
        """Total bytes of a device, and how many devices there are. Disarms any fault."""
        self._limit, self._count, self._capability = memory, devices, capability
        self._library.simulated_configure(memory, devices)
        self.clear_fault()

    def inject(self, fault: Fault, after: int = 0) -> None:
        """Strike once ``after`` more operations have run, as torch dispatches them.
        ``out_of_memory`` fails the next allocation, ``nan`` turns the next floating result into
        NaN; ``hang`` blocks every operation until ``clear_fault``, ``death`` fails every one."""
        self._library.simulated_inject(1 + FAULTS.index(fault), after)

    def clear_fault(self) -> None:
        self._library.simulated_inject(0, 0)

    def operations(self) -> int:
        """Operations that ran since the process began."""
        return int(self._library.simulated_operations())

    def allow_host_operands(self, operator: str) -> None:
        """Let ``namespace::name`` take host tensors beside the device's, as its vendor wants."""
        self._library.simulated_allow_host_operands(operator.encode())


def install(name: str, communication: str) -> SimulatedModule:
    """Make ``name`` a device of torch in this process, and ``communication`` its distributed
    backend. Raises BuildError without a C++ compiler, ValueError when the process has a device of
    another name."""
    if _installed:
        found = _installed[0]
        if found.device != name:
            raise ValueError(
                f"this process simulates {found.device!r} already, and torch lets a process have "
                f"one such device; simulate {name!r} in another"
            )
    else:
        for variable in ONEDNN_CACHES:
            os.environ.setdefault(variable, "64")
        library = build.load()
        library.simulated_register()
        found = SimulatedModule(name, library)
        rename_privateuse1_backend(name)
        torch._register_device_module(name, found)
        generate_methods_for_privateuse1_backend()
        _installed.append(found)
    process_group.register(communication, name)
    return found
