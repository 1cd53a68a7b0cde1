"""IBM's Spyre cards, which a compiler drives: tensors stay in the host's memory."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import torch

from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import Device, Placement
from vllm_di.errors import ConfigError, PortError

PACKAGES = {
    "torch_sendnn": "install it from IBM's Spyre image; no public registry has it",
    "fms.utils.spyre.paged": "install it with: pip install ibm-fms==1.13.1",
}
"""Modules of the vendor that a card needs, which register its compiler and its ops with torch."""


class SpyreDevice(HostDevice):
    """The compiler moves weights, cache and inputs. A card computes in float16; the simulation also
    in float32.

    ``simulated``: stand-ins of the vendor's compiler and ops, on the host. Raises PortError where
    it is false and the vendor's packages are missing.
    """

    supported_dtypes: tuple[torch.dtype, ...] = (torch.float16,)

    def __init__(
        self,
        placement: Placement | None = None,
        *,
        simulated: bool,
        threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None,
        memory_budget: str | int | None,
        default_dtype: str,
    ) -> None:
        self.simulated = simulated
        if not simulated:
            _load_vendor()
        else:
            from vllm_di.ports.spyre.simulation import define_ops

            define_ops()
            self.supported_dtypes = (torch.float16, torch.float32)
        super().__init__(
            placement,
            threads=threads,
            memory_budget=memory_budget,
            default_dtype="float16" if default_dtype == "auto" else default_dtype,
        )

    def compiler(self, name: str) -> str | Callable[..., Any]:
        """A backend of ``torch.compile``. Raises ConfigError for one that torch does not know."""
        if name == "sendnn" and self.simulated:
            from vllm_di.ports.spyre.simulation import sendnn

            return sendnn
        known = torch._dynamo.list_backends(())
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or ["sendnn"]
            raise ConfigError(
                f"program.backend: torch has no compiler {name!r}; did you mean {near[0]!r}? "
                f"It has {', '.join(known)}"
            )
        return name


def _load_vendor() -> None:
    for module, remedy in PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise PortError(
                f"platform=spyre needs the Python module {module} ({error}): {remedy}; "
                "device.simulated=true runs without a card"
            ) from None


def spyre_device(device: Device, what: str) -> SpyreDevice:
    """``device``, for a part that needs the vendor's ops. Raises ConfigError."""
    if not isinstance(device, SpyreDevice):
        raise ConfigError(f"{what} needs device=spyre, not {type(device).__name__}")
    return device
