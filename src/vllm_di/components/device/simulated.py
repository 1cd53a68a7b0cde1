"""A simulated device in place of a port's hardware (``device.simulated=true``).

What runs on it shows that a port keeps the interfaces and calls its vendor's kernels rightly. It
says nothing of the vendor's kernels themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

import msgspec

from vllm_di.components.device.sizes import parse_size
from vllm_di.errors import ConfigError
from vllm_di.kernels.build import BuildError
from vllm_di.kernels.simulated.module import SimulatedModule, install


class Simulation(ABC):
    """How a port's device is simulated: a node of the port's device."""

    name: str | None = None
    """The simulated device's name in torch, where torch keeps that of the real one for itself
    (``cuda``, ``xpu``, ``hpu``); None: the real one's."""

    @abstractmethod
    def start(self, name: str) -> Any:
        """Make ``torch.<name>`` a working module, with fresh limits and faults, and return it.
        Raises ConfigError where that cannot be."""


class HostSimulation(Simulation):
    """PrivateUse1 on the host's memory (``kernels/simulated``). A port subclasses it to bring
    stand-ins of its vendor's kernels. ``capability`` is what ``get_device_capability`` says, such
    as ``"9.0"``."""

    def __init__(
        self,
        *,
        memory: str | int,
        devices: Annotated[int, msgspec.Meta(ge=1, le=64)],
        communication: str,
        name: str | None = None,
        capability: str | None = None,
        fault: Literal["out_of_memory", "hang", "nan", "death"] | None,
        fault_after: Annotated[int, msgspec.Meta(ge=0)],
    ) -> None:
        self._memory, self._devices = parse_size(memory, "simulation.memory"), devices
        self._communication, self.name = communication, name
        self._capability = None if capability is None else _capability(capability)
        self._fault, self._after = fault, fault_after

    def start(self, name: str) -> SimulatedModule:
        try:
            module = install(name, self._communication)
        except (BuildError, ValueError) as error:
            raise ConfigError(f"simulated: {error}") from None
        module.configure(self._memory, self._devices, self._capability)
        self.define_kernels(module)
        if self._fault is not None:
            module.inject(self._fault, self._after)
        return module

    def define_kernels(self, module: SimulatedModule) -> None:
        """Define the vendor's operators, on host tensors. May be called more than once."""


def _capability(text: str) -> tuple[int, int]:
    try:
        major, minor = map(int, text.split("."))
    except ValueError:
        raise ConfigError(f'capability: expected "MAJOR.MINOR", got {text!r}') from None
    return major, minor
