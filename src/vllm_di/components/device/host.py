"""The host's own processor and memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from vllm_di.components.device.sizes import parse_size
from vllm_di.components.interfaces import Device, DeviceMemory

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""CPU flags under which products of bfloat16 are native (``bf16`` is Arm's)."""


class HostDevice(Device):
    """Threads, memory and dtypes of the CPU. Sets torch's number of threads, and restores it on
    close."""

    torch_device = torch.device("cpu")
    supported_dtypes = (torch.bfloat16, torch.float32, torch.float16)

    def __init__(
        self,
        *,
        threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None,
        memory_budget: str | int | None,
        default_dtype: str,
    ) -> None:
        self._budget = None if memory_budget is None else parse_size(memory_budget)
        self._base = _resident()
        self.default_dtype = torch.bfloat16 if BF16_FLAGS & _cpu_flags() else torch.float32
        if default_dtype != "auto":
            self.default_dtype = self.dtype(default_dtype)
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))

    def memory(self) -> DeviceMemory:
        if self._budget is not None:
            used = max(0, _resident() - self._base)
            return DeviceMemory(max(0, self._budget - used), self._budget)
        limit, used = _cgroup()
        available, total = _meminfo("MemAvailable"), _meminfo("MemTotal")
        if limit is not None:
            available, total = min(available, limit - used), min(total, limit)
        return DeviceMemory(max(0, available), total)

    def synchronize(self) -> None:
        """Work on the host is done when its call returns."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def close(self) -> None:
        torch.set_num_threads(self._threads_before)


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    lines = (row for row in text.splitlines() if row.startswith(("flags", "Features")))
    return set(next(lines, "").partition(":")[2].split())


def _resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _meminfo(key: str) -> int:
    for row in Path("/proc/meminfo").read_text().splitlines():
        if row.startswith(f"{key}:"):
            return int(row.split()[1]) * 1024
    return 0


def _cgroup() -> tuple[int | None, int]:
    """(limit, usage) in bytes of this process's control group, where there is a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text(), (root / "memory.current").read_text()
    except OSError:
        return None, 0
    return (int(limit), int(used)) if limit.strip().isdigit() else (None, 0)
