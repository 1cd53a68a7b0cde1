"""NeuronCores as JAX sees them, or XLA's CPU in their place."""

from __future__ import annotations

from importlib import util
from typing import Annotated

import msgspec

from vllm_di.components.interfaces import DeviceMemory, Placement
from vllm_di.errors import ConfigError, PortError
from vllm_di.ports.tpu.device import XlaDevice, load_jax, open_chips

PLUGIN = "libneuronxla"
"""The Python package with the PJRT plugin that JAX calls ``neuron``."""
INSTALL = (
    "on a machine with NeuronCores install it with: pip install 'jax-neuronx[stable]' "
    "--extra-index-url https://pip.repos.neuron.amazonaws.com, or try the port with "
    "device.simulated=true"
)


class NeuronDevice(XlaDevice):
    """``chips`` NeuronCores through the vendor's plugin for JAX, which calls neuronx-cc.

    ``simulated``: XLA compiles the same StableHLO for the host's CPU.
    """

    def __init__(
        self,
        placement: Placement | None = None,
        *,
        simulated: bool,
        chips: Annotated[int, msgspec.Meta(ge=1)],
        threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None,
        memory_budget: str | int | None,
        default_dtype: str,
    ) -> None:
        if not simulated and util.find_spec(PLUGIN) is None:
            raise PortError(f"platform=neuron needs the Python package {PLUGIN}; {INSTALL}")
        jax = load_jax("neuron")
        if util.find_spec("flatbuffers") is None:
            raise PortError(
                "platform=neuron needs the Python package flatbuffers, in which JAX keeps exported "
                "programs; install it with: pip install 'vllm-di[neuron]'"
            )
        backend = "cpu" if simulated else "neuron"
        super().__init__(
            placement,
            jax=jax,
            backend=backend,
            chips=open_chips(jax, backend, chips, INSTALL),
            threads=threads,
            memory_budget=memory_budget,
            default_dtype=default_dtype,
        )

    def memory(self) -> DeviceMemory:
        """As XlaDevice. A plugin need not report any: raises ConfigError where ``memory_budget``
        does not say it either."""
        if self.backend == "cpu" or all(chip.memory_stats() for chip in self.chips):
            return super().memory()
        if self._budget is None:
            raise ConfigError(
                "device.memory_budget: JAX's neuron plugin reports no memory; say how much the "
                "weights and the cache may take, e.g. device.memory_budget=12GiB"
            )
        used = sum(x.nbytes for x in self.jax.live_arrays())
        return DeviceMemory(max(0, self._budget - used), self._budget)
