"""The GPUs that kernels are compiled for without one, and what each may take there."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU architecture, by the name that its vendor gives it. The limits hold for one program
    (a thread block, a workgroup)."""

    gpu: GPUTarget
    shared_bytes: int
    """Shared memory (LDS). A launch that takes more fails."""
    registers: int
    """32-bit vector registers of all threads together: the register file that a program can lie
    in. A launch that takes more fails."""
    code_bytes: int | None
    """Machine instructions. A larger kernel runs, but its loops leave the instruction cache. None:
    its size is not known."""
    spilled: int = 0
    """Vector registers of a thread that may lie in memory. None is to: each costs a store and a
    load beside those of the data."""


KIB = 1024
XE = {
    "sub_group_sizes": [16, 32],
    "has_subgroup_matrix_multiply_accumulate": True,
    "has_subgroup_matrix_multiply_accumulate_tensor_float32": True,
    "has_subgroup_2d_block_io": True,
    "has_bfloat16_conversions": True,
}
"""What Intel's Triton asks of a device, as ``ocloc query CL_DEVICE_EXTENSIONS`` answers for PVC and
for Battlemage."""

TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB, 64 * KIB, 128 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB, 64 * KIB, 128 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB, 64 * KIB, 128 * KIB),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * KIB, 64 * KIB, 128 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB, 128 * KIB, 64 * KIB),
    "gfx950": Target(GPUTarget("hip", "gfx950", 64), 160 * KIB, 128 * KIB, 64 * KIB),
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), 64 * KIB, 96 * KIB, 32 * KIB),
    "gfx1201": Target(GPUTarget("hip", "gfx1201", 32), 64 * KIB, 96 * KIB, 32 * KIB),
    "pvc": Target(GPUTarget("xpu", XE, 32), 128 * KIB, 128 * KIB, None),
    "bmg": Target(GPUTarget("xpu", XE, 32), 128 * KIB, 128 * KIB, None),
}
"""NVIDIA: the table "Technical Specifications per Compute Capability" of the CUDA C++ Programming
Guide has the shared memory of a thread block (163, 227, 227, 99 KiB) and the registers of a
multiprocessor (64 K); the instruction cache is not published, and 128 KiB is what Volta's was
measured to have (Jia et al., arXiv 1804.06826).

AMD: the LDS of a workgroup and the registers are those of LLVM's AMDGPU back end (160 KiB on
gfx950, 64 KiB on the others; 512 registers for each of 64 lanes of 4 SIMDs on CDNA, 1,536 for each
of 32 lanes of 2 SIMDs on RDNA 3 and 4); the instruction caches those of AMD's white papers for
CDNA 3 (64 KiB) and RDNA (32 KiB).

Intel: the shared memory of a work group (128 KiB) and the registers of an Xe core (8 vector engines
of 64 KiB) are those of the oneAPI GPU Optimization Guide; the instruction cache is not published.
"""
