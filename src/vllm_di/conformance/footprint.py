"""What this process holds: threads, files, children, shared memory, resident bytes."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import msgspec

from vllm_di.components.device import system

SELF = Path("/proc/self")
SETTLE_SECONDS = 3.0
"""For what ends to be gone, on a machine that is busy with other things."""


class Footprint(msgspec.Struct, frozen=True):
    """Counts at one moment; 0 where the system does not tell."""

    threads: int
    """Python's own and native ones."""
    files: int
    """Open file descriptors."""
    children: int
    shared: int
    """Entries of /dev/shm that no other process holds."""

    def beyond(self, base: Footprint) -> list[str]:
        """What exceeds ``base``."""
        names = self.__struct_fields__
        return [
            f"{name}: {getattr(base, name)} became {getattr(self, name)}"
            for name in names
            if getattr(self, name) > getattr(base, name)
        ]


def footprint() -> Footprint:
    native = _entries(SELF / "task")
    return Footprint(
        threads=native or threading.active_count(),
        files=_entries(SELF / "fd"),
        children=_children(),
        shared=len(_shared()),
    )


def settled(base: Footprint) -> list[str]:
    """What still exceeds ``base`` after a moment: threads and children take one to end."""
    gc.collect()
    pause, deadline = 0.02, time.monotonic() + SETTLE_SECONDS
    while (more := footprint().beyond(base)) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.3)
        gc.collect()
    return more


def resident() -> int:
    """Bytes, after a garbage collection, without what the allocator holds free: it would hide a
    leak that fits in it, and look like one where it grows."""
    gc.collect()
    system.return_freed_memory()
    return system.resident_bytes()


def _entries(folder: Path) -> int:
    try:
        return len(os.listdir(folder))
    except OSError:
        return 0


def _shared() -> set[str]:
    """Shared memory that may be ours: what others have mapped is theirs, and each process's OpenMP
    registers itself by an entry with its process id."""
    folder = Path("/dev/shm")
    names = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    found = {name for name in names if not name.startswith("__KMP_REGISTERED_LIB")}
    others = Path("/proc").glob("[0-9]*/maps") if found else ()
    for maps in others:
        if maps.parent.name != str(os.getpid()):
            try:
                text = maps.read_text(errors="replace")
            except OSError:  # it ended, or is not for us to read
                continue
            found = {name for name in found if f"/dev/shm/{name}\n" not in text}
    return found


def _children() -> int:
    """Child processes, zombies left out."""
    own, count = str(os.getpid()), 0
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            count += len(fields) > 1 and fields[1] == own and fields[0] != "Z"
    return count
