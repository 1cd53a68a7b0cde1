"""Runs Triton kernels on the host's CPU, by Intel's OpenCL runtime: Triton's middle end for Intel's
GPUs, SPIR-V, and Intel's compiler for the CPU. In the environment of ``make xpu-env`` alone.

Matrix units are a GPU's: here a product is made of multiplications and additions. Programs run as
the grid says, with sub-groups of 32 lanes, barriers and local memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from triton.backends.compiler import GPUTarget

from vllm_di.kernels.triton.compile import build

CPU = GPUTarget("xpu", {"sub_group_sizes": [16, 32], "has_bfloat16_conversions": True}, 32)
CAPABILITY, EXECUTION_MODE = 17, 16
"""Opcodes of SPIR-V."""
KERNEL_ATTRIBUTES, MAX_WORKGROUP_SIZE = 5892, 5893
"""Of SPV_INTEL_kernel_attributes, which the CPU's runtime refuses; a bound for a GPU's compiler."""
HEADER = 5
"""Words of SPIR-V before its first instruction."""


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Called as ``kernels.triton.runtime.launch`` is, with host tensors; returns when it ran."""
    import pyopencl as cl

    built, passed = build(CPU, kernel, arguments, constants, num_warps, num_stages)
    _, queue = _device()
    binary = _program(built.hash, built.asm["spv"], built.metadata.name)
    values = [_argument(cl, value) for value in passed]
    if built.metadata.shared:
        values.append(cl.LocalMemory(built.metadata.shared))
    binary.set_args(*values)
    threads = num_warps * built.metadata.threads_per_warp
    wide = (*grid, 1, 1)[:3]
    cl.enqueue_nd_range_kernel(
        queue, binary, (wide[0] * threads, *wide[1:]), (threads, 1, 1), allow_empty_ndrange=True
    )
    queue.finish()


def device_name() -> str:
    """Of the platform and its device."""
    (device,) = _device()[0].devices
    return f"{device.platform.name} on {device.name}"


@functools.cache
def _device() -> tuple[Any, Any]:
    """-> (context, queue). The package's own list of drivers names a folder that is nowhere."""
    [driver] = Path(sys.prefix, "lib").glob("libintelocl.so.*.*")
    with tempfile.TemporaryDirectory(prefix="vllm-di-icd-") as folder:
        Path(folder, "intel.icd").write_text(f"{driver}\n")
        os.environ["OCL_ICD_VENDORS"] = folder
        import pyopencl as cl

        [platform] = cl.get_platforms()
    context = cl.Context(platform.get_devices())
    return context, cl.CommandQueue(context)


@functools.cache
def _program(key: str, spirv: bytes, name: str) -> Any:
    import pyopencl as cl

    context, _ = _device()
    return cl.Kernel(cl.Program(context, _without_bounds(spirv)).build(cache_dir=False), name)


def _without_bounds(spirv: bytes) -> bytes:
    """Less the two instructions that the CPU's runtime does not know."""
    words = struct.unpack(f"<{len(spirv) // 4}I", spirv)
    kept, at = list(words[:HEADER]), HEADER
    while at < len(words):
        count, opcode = words[at] >> 16, words[at] & 0xFFFF
        one = words[at : at + count]
        unknown = (opcode == CAPABILITY and one[1] == KERNEL_ATTRIBUTES) or (
            opcode == EXECUTION_MODE and one[2] == MAX_WORKGROUP_SIZE
        )
        if not unknown:
            kept += one
        at += count
    return struct.pack(f"<{len(kept)}I", *kept)


def _argument(cl: Any, value: Any) -> Any:
    """A tensor's memory as it is: the runtime shares the host's."""
    if isinstance(value, Tensor):
        before = int(value.storage_offset()) * value.itemsize
        size = value.untyped_storage().nbytes() - before
        return cl.SVM((ctypes.c_char * size).from_address(value.data_ptr()))
    if isinstance(value, float):
        return np.float32(value)
    return np.int32(value) if -(2**31) <= value < 2**31 else np.int64(value)
