"""Compiles launches ahead of time, for a target that need not be here.

In place of ``TritonOps.launch``: ops are called on host tensors of the wanted shapes and dtypes,
nothing runs, and each kernel is compiled with the signature, constants and alignments that the
launch would have had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_di.errors import PortError
from vllm_di.kernels.triton.code_objects import Usage, ocloc, usage
from vllm_di.kernels.triton.targets import TARGETS

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


OTHER_TRITON = {
    "xpu": "Intel's own Triton does, which an XPU build of torch brings; in a source tree, "
    "`make xpu-env` puts it in .xpu, and .xpu/bin/vllm-di conform runs there"
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a target's compiler made of one launch."""

    kernel: str
    target: str
    num_warps: int
    num_threads: int
    """Of all warps."""
    num_stages: int
    usage: Usage
    code: dict[str, Any]
    """Stage (``ptx``, ``cubin``, ``amdgcn``, ``hsaco``, ``spv``, ``zebin`` ...) to its text or
    bytes."""


class Compiler:
    """Called as ``TritonOps.launch`` is; keeps what was compiled in ``made``. Raises PortError
    where the installed Triton, or Intel's ocloc, does not compile for the target."""

    def __init__(self, target: str) -> None:
        gpu = TARGETS[target].gpu
        if not any(one.compiler.supports_target(gpu) for one in backends.values()):
            raise PortError(
                f"triton {triton.__version__} compiles for {', '.join(sorted(backends))}, and not "
                f"for {gpu.backend}: " + OTHER_TRITON.get(gpu.backend, "another build of it does")
            )
        if gpu.backend == "xpu":
            ocloc()
        self.target = target
        self.made: list[Compiled] = []

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        num_warps: int = 4,
        num_stages: int = 2,
    ) -> None:
        gpu = TARGETS[self.target].gpu
        built, _ = build(gpu, kernel, arguments, constants, num_warps, num_stages)
        code = dict(built.asm)
        taken = usage(code, self.target, built.metadata.shared)
        # Intel's Triton chooses between 16 and 32 by the kernel
        lanes = getattr(built.metadata, "threads_per_warp", gpu.warp_size)
        self.made.append(
            Compiled(
                kernel=kernel.__name__,
                target=self.target,
                num_warps=num_warps,
                num_threads=num_warps * lanes,
                num_stages=num_stages,
                usage=taken,
                code=code,
            )
        )


def build(
    gpu: GPUTarget,
    kernel: Any,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> tuple[Any, list[Any]]:
    """-> (Triton's compiled kernel, the arguments that its code takes): a constant and a 1 are part
    of the code."""
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | constants
    signature, values, attrs, passed = {}, {}, {}, []
    for place, name in enumerate(names):
        value = given[name]
        if name in constants or (type(value) is int and value == 1):
            signature[name], values[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        passed.append(value)
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if type(number) is int and number % 16 == 0:
            attrs[(place,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(kernel, signature, values, attrs),
        target=gpu,
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    return built, passed


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
