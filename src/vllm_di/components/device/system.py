"""What the operating system says of this process's processors and memory.

A container's limits (control groups, version 1 and 2) count where they are tighter than the
machine's. Where the system has no such file, the question is answered by what POSIX offers.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_di.errors import ConfigError

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def allowed_cores() -> list[int]:
    """Numbers of the processors that the calling thread may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def pin(cores: Sequence[int]) -> list[int]:
    """Have the calling thread, and those it starts, run on ``cores`` alone; return where it could
    run before. Raises ConfigError where the system cannot pin threads."""
    before, pinned = allowed_cores(), getattr(os, "sched_setaffinity", None)
    if pinned is None:
        raise ConfigError("cores: this system cannot pin threads to cores; leave it null")
    pinned(0, cores)
    return before


def usable_cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Processors that this process may run on: its affinity mask, cut by the CPU quota."""
    cores = len(allowed_cores())
    for folder in _folders(proc, cgroups, "cpu"):
        quota, period = [*_words(folder / "cpu.max"), "", ""][:2]
        if not quota:
            quota = "".join(_words(folder / "cpu.cfs_quota_us"))
            period = "".join(_words(folder / "cpu.cfs_period_us"))
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> tuple[int, int]:
    """(free, total) bytes. Memory that the system would give back when asked counts as free."""
    free, total = _machine_memory(proc)
    for folder in _folders(proc, cgroups, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is None or used is None or limit >= total:
            continue
        stat = _table(folder / "memory.stat")
        cached = stat.get("total_inactive_file", stat.get("inactive_file", 0))  # given back first
        free, total = min(free, limit - max(0, used - cached)), limit
    return max(0, free), total


def resident_bytes(proc: Path = PROC) -> int:
    """Memory that this process holds now; 0 where the system does not tell."""
    words = _words(proc / "self" / "statm")
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if len(words) > 1 else 0


def return_freed_memory() -> None:
    """Have the allocator give back to the system what was freed between blocks that stay; it keeps
    that otherwise. Does nothing with an allocator that cannot."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def cpu_flags(proc: Path = PROC) -> set[str]:
    """The processor's feature flags as Linux names them; empty where it does not tell."""
    for line in _text(proc / "cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def cpu_name(proc: Path = PROC) -> str:
    """What the processor calls itself, or its architecture where the system does not tell."""
    for line in _text(proc / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _machine_memory(proc: Path) -> tuple[int, int]:
    table = _table(proc / "meminfo")
    if "MemAvailable" in table:
        return table["MemAvailable"] * 1024, table["MemTotal"] * 1024
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, total


def _folders(proc: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """The control group of this process and those around it. ``/proc/self/cgroup`` holds lines
    ``0::/path`` (version 2) and ``4:memory:/path`` (version 1)."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        rest = line.partition(":")[2]
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        group = root / path.strip().lstrip("/")
        while group != root and root in group.parents:
            yield group
            group = group.parent
        yield root


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _number(*paths: Path) -> int | None:
    """The number in the first of the files that holds one."""
    for path in paths:
        text = _text(path).strip()
        if text.isdigit():
            return int(text)
    return None


def _table(path: Path) -> dict[str, int]:
    """Lines ``name value`` or ``name: value kB``."""
    rows = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
