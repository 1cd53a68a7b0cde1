"""What the machine can do: bytes read a second, and multiplications. ``python -m
benchmarks.peers.roofline``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import msgspec
import torch

from benchmarks.figures import report

ROUNDS = 7


class Roofline(msgspec.Struct):
    """Medians."""

    read: float
    """Bytes a second, two threads over 1 GiB."""
    bf16: float
    """Operations a second in a product of 2048 cubed."""
    int8: float

    def better(self, other: Roofline) -> Roofline:
        """The larger of each: what disturbs a measurement makes it smaller."""
        return Roofline(
            max(self.read, other.read), max(self.bf16, other.bf16), max(self.int8, other.int8)
        )


def measure() -> Roofline:
    torch.set_num_threads(2)
    whole = torch.ones(2**28)
    left, right = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    ints = [torch.randint(-9, 9, (2048, 2048), dtype=torch.int8) for _ in range(2)]
    return Roofline(
        read=2**30 / _seconds(whole.sum),
        bf16=2 * 2048**3 / _seconds(lambda: left @ right),
        int8=2 * 2048**3 / _seconds(lambda: torch._int_mm(*ints)),
    )


def _seconds(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    found = measure()
    report(
        "roofline",
        {
            "read, GB/s": [found.read / 1e9],
            "bf16 products, GFLOP/s": [found.bf16 / 1e9],
            "int8 products, GOP/s": [found.int8 / 1e9],
        },
    )


if __name__ == "__main__":
    main()
