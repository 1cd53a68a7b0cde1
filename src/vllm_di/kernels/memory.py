"""Memory for the kernels: huge pages for large tensors, and buffers that a recording can reuse."""

from __future__ import annotations

import math
import mmap
import weakref
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HUGE = 2 << 20
"""Bytes of a huge page on x86-64."""


def huge_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that the system hands out as they are touched, in huge pages where it may: a stream
    through weights or KV blocks then misses the page tables less often."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE:
        return torch.zeros(tuple(shape), dtype=dtype)
    region = mmap.mmap(-1, size + HUGE)
    region.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size].view(dtype).view(*shape)


class Pool:
    """Tensors on memory that comes back when the last view of a tensor is gone, and stays the
    pool's."""

    def __init__(self) -> None:
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Like torch.empty."""
        size = math.prod(shape) * dtype.itemsize
        kind = max(64, 1 << (size - 1).bit_length()) if size else 64
        free = self._free[kind]
        chunk = free.pop() if free else _aligned(kind)
        used = chunk[:size]
        # the tensor's storage holds `used`: when it dies, no view of the tensor is left
        weakref.finalize(used, free.append, chunk)
        return torch.from_numpy(used).view(dtype).view(*shape)


def _aligned(size: int) -> npt.NDArray[np.uint8]:
    """``size`` bytes on a cache line's border."""
    whole = np.empty(size + 64, np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + size]
