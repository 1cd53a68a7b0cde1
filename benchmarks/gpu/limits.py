"""What the device can do at most, measured: bytes a second of a copy, bf16 products a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def best(call: Callable[[], float], runs: int) -> float:
    """The least of a few seconds, after one call that does not count."""
    call()
    return min(call() for _ in range(runs))


def timed(device: str, call: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def bandwidth(device: str, size: int) -> float:
    """Bytes a second that a copy of ``size`` bytes reads and writes."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / best(lambda: timed(device, lambda: target.copy_(source)), 10)


def matrix_rate(device: str, size: int) -> float:
    """Operations a second of a square bf16 product."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / best(lambda: timed(device, lambda: torch.mm(a, b, out=out)), 10)
