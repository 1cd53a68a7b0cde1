"""The chips that XLA compiles for; TPUs, or the host in their place."""

from __future__ import annotations

import glob
import importlib
import logging
from collections.abc import Mapping, Sequence
from importlib import util
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from vllm_di.components.device.host import HostDevice
from vllm_di.components.device.sizes import parse_size
from vllm_di.components.interfaces import Device, DeviceMemory, Placement
from vllm_di.errors import ConfigError, PortError

HOST_BUDGET = "8GiB"
"""Where XLA compiles for the host and no budget is given: it touches the whole cache at the start,
so all that is available would be too much."""
CHIPS = ("/dev/accel*", "/dev/vfio/[0-9]*")
"""Files that a machine with TPUs has."""
TPU_REMEDY = (
    "on a machine with TPUs install it with: pip install 'jax[tpu]==0.10.2', or take "
    "device.backend=cpu"
)

SPARES_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

log = logging.getLogger(__name__)


class XlaDevice(Device):
    """Batches are built, and logits sampled, in the host's memory; weights and cache are JAX's, on
    ``chips`` devices of its ``backend`` that share every layer between them."""

    torch_device = torch.device("cpu")
    on_host = True
    supported_dtypes = (torch.bfloat16, torch.float32)
    compiler_options: Mapping[str, str]
    """XLA's, for every program. On a CPU its own order of operations gathers the contexts of all
    layers before the first is attended: 4,344 MB for 16 sequences of 2,048 tokens through the
    demo's model, and 100 MB in the order that spares memory."""

    def __init__(
        self,
        placement: Placement | None,
        *,
        jax: Any,
        backend: str,
        chips: Sequence[Any],
        threads: int | None,
        memory_budget: str | int | None,
        default_dtype: str,
    ) -> None:
        self.jax, self.backend, self.chips = jax, backend, chips
        self.compiler_options = SPARES_MEMORY if backend == "cpu" else {}
        self._budget = None if memory_budget is None else parse_size(memory_budget, "memory_budget")
        self.default_dtype = torch.float32 if backend == "cpu" else torch.bfloat16
        if default_dtype != "auto":
            self.default_dtype = self.dtype(default_dtype)
        self._host = HostDevice(
            placement,
            threads=threads,
            memory_budget=HOST_BUDGET if memory_budget is None else memory_budget,
            default_dtype="float32",
        )

    def memory(self) -> DeviceMemory:
        """Of all chips together; of the host, what is left of the budget."""
        if self.backend == "cpu":
            return self._host.memory()
        stats = [chip.memory_stats() for chip in self.chips]
        total, used = (sum(s[key] for s in stats) for key in ("bytes_limit", "bytes_in_use"))
        total = min(total, self._budget or total)
        return DeviceMemory(max(0, total - used), total)

    def synchronize(self) -> None:
        """A step's logits were waited for: nothing is under way."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._host.zeros(shape, dtype)

    def close(self) -> None:
        self._host.close()


class TpuDevice(XlaDevice):
    """TPUs, or the host in their place."""

    def __init__(
        self,
        placement: Placement | None = None,
        *,
        backend: Literal["auto", "tpu", "cpu"],
        chips: Annotated[int, msgspec.Meta(ge=1)],
        threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None,
        memory_budget: str | int | None,
        default_dtype: str,
    ) -> None:
        jax = load_jax("tpu")
        if backend == "auto":
            here = util.find_spec("libtpu") is not None and any(map(glob.glob, CHIPS))
            backend = "tpu" if here else "cpu"
            if not here:
                log.warning("device.backend: no TPU is here; XLA compiles for the host's CPU")
        super().__init__(
            placement,
            jax=jax,
            backend=backend,
            chips=open_chips(jax, backend, chips, TPU_REMEDY),
            threads=threads,
            memory_budget=memory_budget,
            default_dtype=default_dtype,
        )


def open_chips(jax: Any, backend: str, count: int, remedy: str) -> list[Any]:
    """The first ``count`` devices. JAX has one backend for the life of the process: raises
    ConfigError where it has fewer, PortError, with ``remedy``, where there is none."""
    jax.config.update("jax_platforms", backend)  # else it looks for every accelerator there is
    try:
        if backend == "cpu":
            jax.config.update("jax_num_cpu_devices", count)
        found = jax.devices(backend)
    except RuntimeError as error:
        if "jax_num_cpu_devices" not in str(error):
            raise PortError(
                f"device.backend={backend}: JAX finds no such device ({error}); {remedy}"
            ) from error
        found = jax.devices(backend)  # it was opened before in this process
    if len(found) < count:
        raise ConfigError(
            f"device.chips {count}: JAX has {len(found)} devices of {backend} in this process; "
            "lower it"
        )
    return list(found[:count])


def load_jax(extra: str) -> Any:
    """The package, imported late: the config resolves without it. Raises PortError that names this
    project's ``extra``."""
    try:
        return importlib.import_module("jax")
    except ImportError as error:
        raise PortError(
            f"platform={extra} needs the Python package jax ({error}); "
            f"install it with: pip install 'vllm-di[{extra}]'"
        ) from None


def tpu_device(device: Device, what: str) -> TpuDevice:
    """``device``, for a part that needs JAX's. Raises ConfigError."""
    if not isinstance(device, TpuDevice):
        raise ConfigError(f"{what} needs device=tpu, not {type(device).__name__}")
    return device
