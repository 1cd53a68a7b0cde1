"""What the launching side asks of Triton itself."""

from __future__ import annotations

from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

VERSION: str = triton.__version__


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Run a kernel on the current device's stream."""
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    kernel[grid](*arguments, **constants, **options)


def power_of_2(size: int) -> int:
    """The next one, ``size`` itself included."""
    return 1 << max(0, size - 1).bit_length()


def num_multiprocessors() -> int:
    """Of the current device."""
    device = driver.active.get_current_device()
    return int(driver.active.utils.get_device_properties(device)["multiprocessor_count"])


def architecture() -> str:
    """Of the current device, as its vendor names it: ``sm_90``, ``gfx942``. Intel's Triton gives
    properties and no name: ``bmg`` stands for all whose registers have 64 bytes (PVC, Xe2, Xe3),
    ``dg2`` for those of 32. Interpreted kernels are cut as for sm_90."""
    if is_interpreted():
        return "sm_90"
    target = driver.active.get_current_target()
    if target.backend == "xpu":
        return "bmg" if min(target.arch["sub_group_sizes"]) >= 16 else "dg2"
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the host, which has no products of bf16."""
    return bool(knobs.runtime.interpret)
