"""What this port takes from Habana's package, and what it says where that is absent."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from vllm_di.components.interfaces import Device
from vllm_di.errors import ConfigError

INSTALL = "install Intel's Gaudi software with the habana-torch-plugin that belongs to it"

FusedSdpa = Callable[..., Any]
"""``FusedSDPA.apply(q, k, v, mask, dropout, is_causal, scale, softmax_mode, recompute,
valid_seq_lengths, padding_side)``: q [B, heads, S, D], k and v [B, kv_heads, T, D], positional."""


def fused_sdpa(device: Device) -> FusedSdpa:
    """Raises ConfigError where it is missing. ``device`` is named so that it is opened first."""
    apply: FusedSdpa = _module(device, "hpex.kernels").FusedSDPA.apply
    return apply


def mark_step(device: Device) -> Callable[[], None]:
    """Has what was recorded lazily run."""
    mark: Callable[[], None] = _module(device, "core").mark_step
    return mark


def is_lazy(device: Device) -> bool:
    """Whether the package was imported in lazy mode, which it settles once for the process."""
    return bool(_module(device, "utils.internal").is_lazy())


def _module(device: Device, name: str) -> Any:
    try:
        return importlib.import_module(f"habana_frameworks.torch.{name}")
    except ImportError as error:
        raise ConfigError(
            f"{device.torch_device}: habana_frameworks.torch.{name} cannot be imported "
            f"({error}): {INSTALL}"
        ) from error
