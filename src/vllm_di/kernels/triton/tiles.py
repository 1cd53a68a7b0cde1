"""How the attention kernel is cut, by the architecture of the GPU.

Each row is the largest cut that spills no register and fits the shared memory at the shapes of
Llama-3-8B, as ``vllm-di conform --level compile`` measures it. None was tuned for speed on
hardware.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's part."""

    rows: int
    """Queries times heads of a group."""
    columns: int
    """Keys of one pass of the loop."""
    num_warps: int


@dataclass(frozen=True, slots=True)
class Tiling:
    """What an architecture can hold."""

    num_stages: int
    """Loads in flight; each takes shared memory, or registers on RDNA."""
    key_bytes: int = 16384
    """Keys of one pass, all elements of a head: 64 of 128 in bfloat16."""
    most_columns: int = 64
    """The same in keys, for small heads."""
    middle_warps: int = 4
    """Of tiles of more rows than a decode's, up to 64."""
    large_warps: int = 8
    """Of tiles of 128 rows."""
    token_warps: int = 4
    """Of kernels that hold all heads of a token, or all splits of a head, at once."""
    experts_warps: int = 4
    """Of the products of experts."""

    def tile(self, head_size: int, group: int, rows: int, itemsize: int) -> Tile:
        """``rows`` is what an average sequence of the batch has: queries times heads of a group;
        ``itemsize`` is in bytes."""
        row_bytes = _power_of_2(head_size) * itemsize
        columns = min(self.most_columns, max(16, self.key_bytes // row_bytes))
        least = max(16, _power_of_2(group))
        most = 32 if itemsize > 2 else 128 if row_bytes <= 256 else 64
        if least > most:  # a large group: the queries alone take half of the shared memory
            return Tile(least, max(16, columns // 2), 8)
        if rows <= least or most == least:
            return Tile(least, columns, 4)
        if rows <= 64 or most <= 64:
            return Tile(min(64, most), columns, self.middle_warps)
        return Tile(128, columns, self.large_warps)


XE = Tiling(
    num_stages=1,
    key_bytes=8192,
    most_columns=32,
    middle_warps=8,
    large_warps=16,
    token_warps=8,
    experts_warps=8,
)
"""PVC and Xe2. Each of its threads is a whole warp of 16 lanes, and a matrix product has 8 rows: a
warp of a tile of 128 rows holds 8 of them where there are 16 warps. With 8 warps a prefill spills
228 registers, with 4 the products of experts 102, the merge of splits 112, rotary embedding 19.
With 64 keys a pass heads of 64 spill 143 in a decode and 135 in a prefill, heads of 256 464."""

TILINGS = {
    "sm_80": Tiling(
        num_stages=3, middle_warps=8
    ),  # with 4 warps the middle tile spills 5 registers
    "sm_90": Tiling(num_stages=3),
    "sm_100": Tiling(num_stages=3),
    "sm_120": Tiling(num_stages=3),
    "gfx942": Tiling(num_stages=2),  # its matrix registers lie beside the others: 512 for a thread
    "gfx950": Tiling(num_stages=2),
    # a wave of 32 lanes holds twice the elements of a wave of 64 in each register file: with the
    # tiles of gfx942 gfx1100 spills 81 registers in a decode and 256 in a chunk
    "gfx1100": Tiling(num_stages=1, key_bytes=8192, middle_warps=8),
    "gfx1201": Tiling(num_stages=2, key_bytes=8192, middle_warps=8),
    "pvc": XE,
    "bmg": XE,
}
SMALLEST = Tiling(num_stages=1, key_bytes=8192, middle_warps=8)
"""For an architecture of another family."""
LEAST_COMMON = 3
"""Characters of a family's name: ``sm_``, ``gfx``."""


def tiling_of(architecture: str) -> tuple[str, Tiling]:
    """-> (name of the row, the row) that an architecture such as ``sm_90`` or ``gfx942`` takes: its
    own, else that of the nearest relative, which shares most of its name."""

    def common(name: str) -> int:
        pairs = zip(name, architecture, strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    if architecture in TILINGS:
        return architecture, TILINGS[architecture]
    nearest = max(TILINGS, key=common)
    if common(nearest) < LEAST_COMMON:
        return "smallest", SMALLEST
    return nearest, TILINGS[nearest]


def _power_of_2(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
