"""A device binary as Intel's compiler writes it, with the sections that are read."""

from __future__ import annotations

import struct


def zebin(
    *, grf_count: int = 128, simd_size: int = 16, spill_size: int = 0, code: int = 64
) -> bytes:
    """An ELF file with ``.text.K``, ``.ze_info`` and the section of their names."""
    spills = f"      spill_size:      {spill_size}\n" if spill_size else ""
    info = (
        "kernels:\n  - name:            K\n    execution_env:\n"
        f"      grf_count:       {grf_count}\n      simd_size:       {simd_size}\n{spills}"
        "    per_thread_memory_buffers:\n      - type:            scratch\n"
        "        usage:           single_space\n        size:            4096\n"
    ).encode()
    parts = {"": b"", ".text.K": bytes(code), ".ze_info": info, ".shstrtab": b""}
    names = b"\0".join(name.encode() for name in parts) + b"\0"
    parts[".shstrtab"] = names
    head, body, headers = 64, b"", b""
    for name, content in parts.items():
        place = names.index(name.encode() + b"\0")
        headers += struct.pack(
            "<IIQQQQIIQQ", place, 1, 0, 0, head + len(body), len(content), *[0] * 4
        )
        body += content
    start = struct.pack("<16sHHIQQQ", b"\x7fELF\x02\x01\x01", 0, 205, 1, 0, 0, head + len(body))
    start += struct.pack("<IHHHHHH", 0, head, 0, 0, 64, len(parts), len(parts) - 1)
    return start + body + headers
