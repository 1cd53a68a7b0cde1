"""Instruction sets of x86 and ARM CPUs: what each needs, how code for it is compiled, and which of
them this machine can use."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

AMX = "amx"
EMULATED = "amx_emulated"
"""AMX's tile registers in plain C++, beside the best other instruction set of this machine. For
tests: slower than anything else."""
AUTO = "auto"
GENERIC = "generic"
"""Plain C++, on any machine."""

_WIDE = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_BF16 = (*_WIDE, "-mavx512bf16", "-mavx512vnni")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    AMX: (*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512_bf16": _BF16,
    "avx512": _WIDE,
    "avx2": ("-march=x86-64-v3",),
    "neon_bf16": ("-march=armv8.2-a+fp16+dotprod+bf16+i8mm",),
    "neon": ("-march=armv8.2-a+fp16+dotprod",),
    GENERIC: (),
}
"""Instruction sets, the best of an architecture first, with the flags that a kernel of it is
compiled with. Every aarch64 has NEON, which the compiler uses in ``generic``; ``neon`` is what has
dot products of bytes as well."""
_V3 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_V4_BF16 = _V4 | {"avx512_bf16", "avx512_vnni"}
_DOT = {"asimd", "asimdhp", "asimddp", "fphp", "atomics", "asimdrdm", "crc32"}
NEEDED: dict[str, set[str]] = {
    AMX: _V4_BF16 | {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512_bf16": _V4_BF16,
    "avx512": _V4,
    "avx2": _V3,
    "neon_bf16": _DOT | {"bf16", "i8mm"},
    "neon": _DOT,
    GENERIC: set(),
}
"""CPU flags (names of /proc/cpuinfo) that the code of an instruction set may use: the levels of the
x86-64 psABI, and what ``-march`` names of ARM's."""
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "x86_64": (AMX, "avx512_bf16", "avx512", "avx2", GENERIC),
    "aarch64": ("neon_bf16", "neon", GENERIC),
}
"""Names of uname -m to their instruction sets, best first. Any other machine runs ``generic``."""

SYS_ARCH_PRCTL = 158
ARCH_REQ_XCOMP_PERM = 0x1023
XFEATURE_XTILEDATA = 18
"""Linux, arch/x86/include/uapi/asm/prctl.h and fpu/types.h; the number of the call is x86-64's."""
PROBE = '__asm__("tilerelease");'


class Choice(NamedTuple):
    isa: str
    passed_over: dict[str, str]
    """Better instruction sets that the CPU has, to why they cannot be used."""


def machine() -> str:
    """The architecture of this machine, as uname -m calls it."""
    return platform.machine()


def isas_of(architecture: str) -> tuple[str, ...]:
    """The instruction sets that there is code for, best first."""
    return ARCHITECTURES.get(architecture, (GENERIC,))


def cpu_flags() -> set[str]:
    """What /proc/cpuinfo lists of the first CPU: ``flags`` on x86, ``Features`` on ARM."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        rows = []
    listed = next((row for row in rows if row.startswith(("flags", "Features"))), "")
    return set(listed.partition(":")[2].split())


def usable_isas() -> list[str]:
    """The instruction sets that this CPU has, best first."""
    flags = cpu_flags()
    return [isa for isa in isas_of(machine()) if NEEDED[isa] <= flags]


def choose_isa(*, needs_compiler: bool = True) -> Choice:
    """The best instruction set of this CPU that the kernel and the compiler let us use."""
    passed_over: dict[str, str] = {}
    for isa in usable_isas():
        if why := hindrance(isa, needs_compiler=needs_compiler):
            passed_over[isa] = why
        else:
            return Choice(isa, passed_over)
    raise AssertionError("generic is always usable")


def hindrance(isa: str, *, needs_compiler: bool = True) -> str:
    """Why an instruction set that the CPU has cannot be used; empty where it can."""
    if isa != AMX:
        return ""
    return tiles_refused() or (compiler_lacks_tiles() if needs_compiler else "")


def flags_of(isa: str) -> tuple[str, ...]:
    """The compiler flags of an instruction set."""
    if isa != EMULATED:
        return ISA_FLAGS[isa]
    best = next(other for other in usable_isas() if other != AMX)
    return (*ISA_FLAGS[best], "-DEMULATE_TILES")


@functools.cache
def tiles_refused() -> str:
    """Asks the kernel, once, that this process may use tile registers: Linux keeps their state for
    those who asked alone. Empty, or why it refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0:
        return ""
    return f"the kernel refuses tile registers ({os.strerror(ctypes.get_errno())})"


@functools.cache
def compiler_lacks_tiles() -> str:
    """Empty where the compiler knows AMX, or there is none to ask; else what it says."""
    compiler = find_compiler()
    if compiler is None:
        return ""
    command = [compiler, *ISA_FLAGS[AMX], "-x", "c++", "-c", "-", "-o", os.devnull]
    done = subprocess.run(command, input=PROBE, capture_output=True, text=True)
    if not done.returncode:
        return ""
    return f"{Path(compiler).name} does not know AMX: {first_error(done.stderr)}"


def find_compiler() -> str | None:
    """The C++ compiler on the PATH."""
    return shutil.which("g++") or shutil.which("clang++")


def first_error(text: str) -> str:
    """The line of a compiler's output that says what went wrong."""
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[0] if lines else "no message"
