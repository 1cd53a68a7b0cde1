"""What a compiled kernel takes, read from what the vendor's compiler left."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_di.errors import PortError

REGISTER_BYTES = 4
ALLOCATION = "--regAllocOptLevel=2"
"""What Triton passes to the assemblers that know it; their ``--help`` does not name it."""
GRF_BYTES = 64
"""A register of PVC and Xe2."""
LARGE_REGISTER_FILE = "-cl-intel-256-GRF-per-thread"
SPILL_BYTES = 1000
"""Intel's Triton builds a kernel that spills more once more, with the large register file
(``load_binary`` of its ``driver.c``)."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one kernel."""

    registers: int
    """32-bit vector registers of a thread."""
    spilled: int
    """Of these, how many times one lies in memory."""
    stack_bytes: int
    """Memory of a thread."""
    shared_bytes: int
    """Shared memory (LDS) of a program, as its launch asks for it."""
    code_bytes: int
    """Machine instructions."""


def usage(stages: dict[str, Any], target: str, shared_bytes: int) -> Usage:
    """``stages`` are Triton's: ``ptx`` and ``cubin``, ``amdgcn`` and ``hsaco``, or ``spv``, to
    which ``zebin`` is added; ``target`` is a name such as ``sm_90``. Raises ValueError where they
    do not say it, PortError where Intel's compiler is not there."""
    if "hsaco" in stages:
        return _amd(stages["amdgcn"], stages["hsaco"], shared_bytes)
    if "spv" in stages:
        stages["zebin"] = _native(stages["spv"], target)
        return _intel(stages["zebin"], shared_bytes)
    return _nvidia(stages["ptx"], stages["cubin"], int(target.removeprefix("sm_")), shared_bytes)


def _amd(assembly: str, binary: bytes, shared_bytes: int) -> Usage:
    """By the metadata of the code object, which stands in the assembly as text. On CDNA
    ``.vgpr_count`` holds the accumulation registers as well. A launch may ask for shared memory
    beside the code object's own ``.group_segment_fixed_size``, as Triton's do for all of theirs."""

    def entry(name: str) -> int:
        return _number(rf"^\s*\.{name}:\s+(\d+)", assembly, f"the code object has no .{name}")

    return Usage(
        registers=entry("vgpr_count"),
        spilled=entry("vgpr_spill_count"),
        stack_bytes=entry("private_segment_fixed_size"),
        shared_bytes=max(shared_bytes, entry("group_segment_fixed_size")),
        code_bytes=code_bytes(binary),
    )


def _nvidia(ptx: str, binary: bytes, arch: int, shared_bytes: int) -> Usage:
    """By ``ptxas -v``, run as Triton runs it."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability  # newer than 3.3

    ptxas = str(get_ptxas(arch).path)
    with tempfile.TemporaryDirectory(prefix="vllm-di-ptxas-") as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        name = f"--gpu-name={sm_arch_from_capability(arch)}"
        command = [ptxas, "-v", name, str(source), "-o", str(source.with_suffix(".o"))]
        for options in ([ALLOCATION], []):
            done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
            if "Unknown option" not in done.stderr:
                break
    if done.returncode:
        raise ValueError(f"ptxas failed: {done.stderr.strip()}")

    def entry(pattern: str) -> int:
        return _number(pattern, done.stderr, f"ptxas -v does not say {pattern!r}")

    return Usage(
        registers=entry(r"Used (\d+) registers"),
        spilled=-(-entry(r"(\d+) bytes spill stores") // REGISTER_BYTES),
        stack_bytes=entry(r"(\d+) bytes stack frame"),
        shared_bytes=shared_bytes,
        code_bytes=code_bytes(binary),
    )


def _intel(binary: bytes, shared_bytes: int) -> Usage:
    """By the section ``.ze_info``. A register there is one of a whole warp (64 bytes), and so are
    the bytes that spill; they are divided among its lanes."""
    info = _ze_info(binary)
    lanes = _entry(info, "simd_size")
    lane_bytes = lanes * REGISTER_BYTES
    buffers = re.findall(r"type:\s+scratch\n\s+usage:\s+\w+\n\s+size:\s+(\d+)", info)
    return Usage(
        registers=_entry(info, "grf_count") * GRF_BYTES // lane_bytes,
        spilled=-(-_entry(info, "spill_size", absent=0) // lane_bytes),
        stack_bytes=sum(map(int, buffers)) // lanes,
        shared_bytes=max(shared_bytes, _entry(info, "slm_size", absent=0)),
        code_bytes=code_bytes(binary),
    )


def _ze_info(binary: bytes) -> str:
    for name, text in sections(binary):
        if name == ".ze_info":
            return text.decode()
    raise ValueError("the code has no section .ze_info")


def _entry(info: str, name: str, absent: int | None = None) -> int:
    found = re.search(rf"^\s*{name}:\s+(\d+)", info, re.MULTILINE)
    if found:
        return int(found[1])
    if absent is None:
        raise ValueError(f".ze_info has no {name}")
    return absent


def ocloc() -> str:
    """Path of Intel's offline compiler: beside this Python, or on the PATH. Raises PortError."""
    found = shutil.which("ocloc", path=str(Path(sys.executable).parent)) or shutil.which("ocloc")
    if found is None:
        raise PortError(
            "ocloc, Intel's offline compiler, is not installed: it is the package intel-ocloc of "
            "Intel's and Debian's repositories; in a source tree, `make xpu-env` puts it in .xpu"
        )
    return found


def compiler_versions() -> dict[str, str]:
    """Of the vendors' compilers that stand beside Triton and not in it."""
    try:
        program = ocloc()
    except PortError:
        return {}
    with tempfile.TemporaryDirectory(prefix="vllm-di-ocloc-") as folder:  # it leaves a file
        command = [program, "query", "OCL_DRIVER_VERSION"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return {"ocloc": done.stdout.strip()}


def _native(spirv: bytes, device: str) -> bytes:
    """Machine code for one GPU, as Triton's driver has it made. Raises ValueError with ocloc's
    words."""
    command = [ocloc(), "compile", "-spirv_input", "-device", device]
    with tempfile.TemporaryDirectory(prefix="vllm-di-ocloc-") as folder:
        source, binary = Path(folder) / "kernel.spv", Path(folder) / "kernel.bin"
        source.write_bytes(spirv)
        for options in ("", LARGE_REGISTER_FILE):
            files = ["-file", str(source), "-o", str(binary), "-options", options]
            done = subprocess.run(
                [*command, *files], cwd=folder, capture_output=True, text=True, check=False
            )
            if done.returncode or not binary.is_file():
                raise ValueError(f"ocloc failed: {(done.stdout + done.stderr).strip()}")
            code = binary.read_bytes()
            if _entry(_ze_info(code), "spill_size", absent=0) <= SPILL_BYTES:
                break
    return code


def _number(pattern: str, text: str, otherwise: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ValueError(otherwise)
    return int(found[1])


def code_bytes(binary: bytes) -> int:
    """Of an ELF file: the sections that hold instructions."""
    return sum(len(part) for name, part in sections(binary) if name.split(".")[:2] == ["", "text"])


def sections(binary: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each section of a 64-bit, little-endian ELF file."""
    if binary[:6] != b"\x7fELF\x02\x01":
        raise ValueError("the code is no 64-bit ELF file")
    (offset,) = struct.unpack_from("<Q", binary, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", binary, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", binary, offset + index * entry_size) for index in range(count)
    ]  # name, type, flags, address, offset, size
    names = headers[names_index][4]
    for name, _, _, _, begin, size in headers:
        start = names + name
        text = binary[start : binary.index(b"\0", start)].decode()
        yield text, binary[begin : begin + size]
