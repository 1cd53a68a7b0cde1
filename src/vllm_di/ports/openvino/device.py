"""The host as OpenVINO's CPU plugin sees it, and the compilation of a model for it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from vllm_di.cache import foreign_folder
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import Device, DeviceMemory, Placement
from vllm_di.errors import ConfigError, PortError

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.uint8: "u8"}
"""OpenVINO's names of the dtypes that this port uses."""
CACHE_OF = {
    torch.float32: (torch.float32, torch.uint8),
    torch.bfloat16: (torch.bfloat16, torch.uint8),
}
"""KV dtypes that the plugin takes beside each inference precision."""

KERNELS = 64
"""Of each kind, that the plugin keeps for batch shapes that it has seen. Its own default of 5,000
lets memory grow for as long as there are new shapes, and was no faster: SmolLM2 under 24 requests
at a time gave 438 tokens a second with 64, 419 with none and 429 with 5,000."""


class OpenVinoDevice(Device):
    """Threads and memory of the host; dtypes that the CPU plugin has products of."""

    torch_device = torch.device("cpu")
    on_host = True

    def __init__(
        self,
        placement: Placement | None = None,
        *,
        threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None,
        memory_budget: str | int | None,
        default_dtype: str,
    ) -> None:
        self._core: Any = load_openvino().Core()
        if "CPU" not in self._core.available_devices:
            raise PortError(
                "OpenVINO has no CPU plugin here; it offers "
                f"{', '.join(self._core.available_devices) or 'no device'}"
            )
        can = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        name = self._core.get_property("CPU", "FULL_DEVICE_NAME")
        self.target = f"{name}: {', '.join(sorted(can))}"
        """The processor, as OpenVINO compiles for it."""
        half = (torch.bfloat16,) if "BF16" in can else ()
        self.supported_dtypes = (*half, torch.float32)
        self.default_dtype = self.supported_dtypes[0]
        if default_dtype != "auto":
            self.default_dtype = self.dtype(default_dtype)
        self._host = HostDevice(
            placement, threads=threads, memory_budget=memory_budget, default_dtype="float32"
        )
        self._threads = torch.get_num_threads()

    def compile(
        self, model: Any, dtype: torch.dtype, cache_dtype: torch.dtype, cache_dir: str | None
    ) -> Any:
        """An ``openvino.Model`` -> an ``openvino.CompiledModel`` that infers in ``dtype`` and whose
        KV cache has ``cache_dtype``. Raises ConfigError for a pair that the plugin refuses."""
        if cache_dtype not in CACHE_OF[dtype]:
            pairs = ", ".join(f"{NAMES[c]}" for c in CACHE_OF[dtype])
            raise ConfigError(
                f"{NAMES[cache_dtype]}: with model.dtype {NAMES[dtype]} OpenVINO's PagedAttention "
                f"takes a KV cache of {pairs}",
                key="kv_layout.dtype",
            )
        options = {
            "INFERENCE_PRECISION_HINT": NAMES[dtype],
            "KV_CACHE_PRECISION": NAMES[cache_dtype],
            "KEY_CACHE_QUANT_MODE": "BY_CHANNEL",
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "CPU_RUNTIME_CACHE_CAPACITY": str(KERNELS),
        }
        if cache_dir is None:
            return self._core.compile_model(model, "CPU", options)
        # OpenVINO writes in place and does not check what it reads
        with foreign_folder(Path(cache_dir).expanduser()) as folder:
            if folder is not None:
                options["CACHE_DIR"] = str(folder)
            return self._core.compile_model(model, "CPU", options)

    def memory(self) -> DeviceMemory:
        return self._host.memory()

    def synchronize(self) -> None:
        """Work on the host is done when its call returns."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._host.zeros(shape, dtype)

    def close(self) -> None:
        self._core = None  # it has threads
        self._host.close()


def load_openvino() -> Any:
    """The package, imported late: the config resolves without it. Raises PortError."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise PortError(
            f"platform=openvino needs the Python package openvino ({error}); "
            "install it with: pip install 'vllm-di[openvino]'"
        ) from None


def openvino_device(device: Device, what: str) -> OpenVinoDevice:
    """``device``, for a part that needs OpenVINO's. Raises ConfigError."""
    if not isinstance(device, OpenVinoDevice):
        raise ConfigError(f"{what} needs device=openvino, not {type(device).__name__}")
    return device
