"""What a compiled kernel takes, read from what the vendor's compiler left."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

REGISTER_BYTES = 4
ALLOCATION = "--regAllocOptLevel=2"
"""What Triton passes to the assemblers that know it; their ``--help`` does not name it."""


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


def usage(stages: dict[str, Any], arch: int | str, shared_bytes: int) -> Usage:
    """``stages`` are Triton's: ``ptx`` and ``cubin``, or ``amdgcn`` and ``hsaco``. Raises
    ValueError where they do not say it."""
    if "hsaco" in stages:
        return _amd(stages["amdgcn"], stages["hsaco"], shared_bytes)
    return _nvidia(stages["ptx"], stages["cubin"], int(arch), shared_bytes)


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


def _number(pattern: str, text: str, otherwise: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ValueError(otherwise)
    return int(found[1])


def code_bytes(binary: bytes) -> int:
    """Of an ELF file: the sections that hold instructions."""
    return sum(size for name, size in _sections(binary) if name.split(".")[:2] == ["", "text"])


def _sections(binary: bytes) -> Iterator[tuple[str, int]]:
    """Name and bytes of each section of a 64-bit, little-endian ELF file."""
    if binary[:6] != b"\x7fELF\x02\x01":
        raise ValueError("the code is no 64-bit ELF file")
    (offset,) = struct.unpack_from("<Q", binary, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", binary, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", binary, offset + index * entry_size) for index in range(count)
    ]  # name, type, flags, address, offset, size
    names = headers[names_index][4]
    for name, _, _, _, _, size in headers:
        start = names + name
        yield binary[start : binary.index(b"\0", start)].decode(), size
