"""Collectives over shared memory beside gloo, in turns in the same processes: microseconds a call.

``python -m benchmarks.communicator [--ranks 2]``. Every rank has one thread; bf16.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable

import torch

from vllm_di.commands.table import print_table
from vllm_di.components.communicator.shared_memory import SharedMemoryCommunicator
from vllm_di.components.communicator.torch_distributed import TorchDistributedCommunicator
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import Communicator, Placement

SIZES = {"4 KB": 4 << 10, "64 KB": 64 << 10, "512 KB": 512 << 10, "4 MB": 4 << 20}
ROUNDS = 7
Times = dict[tuple[str, str, str], list[float]]
"""Call, size, communicator -> microseconds, one for each round."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.communicator")
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    addresses = _free_address(), _free_address()
    context = multiprocessing.get_context("spawn")
    with context.Pool(ranks) as pool:
        times = pool.starmap(rank, [(r, ranks, *addresses) for r in range(ranks)], chunksize=1)[0]
    rows = []
    for call, size in dict.fromkeys((call, size) for call, size, _ in times):
        shared, gloo = times[call, size, "shared memory"], times[call, size, "gloo"]
        ratios = [b / a for a, b in zip(shared, gloo, strict=True)]
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        figures = (f"{statistics.median(values):,.1f}" for values in (shared, gloo))
        rows.append([call, size, *figures, f"{statistics.median(ratios):.1f}", spread])
    print(f"{ranks} ranks, microseconds a call, medians of {ROUNDS} rounds\n")
    print_table(["call", "bytes", "shared memory", "gloo", "times faster", "spread"], rows)


def rank(number: int, ranks: int, ours: str, theirs: str) -> Times:
    """What one rank does, and rank 0's times."""
    placement = Placement(number, ranks, ours)
    device = HostDevice(placement, threads=1, memory_budget=None, default_dtype="float32")
    shared = SharedMemoryCommunicator(
        placement, device, piece="256KiB", spin=100, timeout=60, cache=None
    )
    gloo = TorchDistributedCommunicator(
        Placement(number, ranks, theirs), device, backend="gloo", timeout=60
    )
    both: dict[str, Communicator] = {"shared memory": shared, "gloo": gloo}
    found: Times = {}
    for name, size in SIZES.items():
        x = torch.zeros(size // 2, dtype=torch.bfloat16)
        for round_ in range(ROUNDS + 1):
            for which, communicator in both.items():
                for call, run in calls(communicator, x).items():
                    value = microseconds(run, 2_000_000 // (size + 20_000))
                    found.setdefault((call, name, which), []).extend([value] if round_ else [])
    gloo.close()
    shared.close()
    return found


def calls(c: Communicator, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Of one size."""
    return {"all_reduce": lambda: c.all_reduce(x), "all_gather": lambda: c.all_gather(x)}


def microseconds(run: Callable[[], object], count: int) -> float:
    run()
    begin = time.perf_counter()
    for _ in range(max(count, 3)):
        run()
    return 1e6 * (time.perf_counter() - begin) / max(count, 3)


def _free_address() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{sock.getsockname()[1]}"


if __name__ == "__main__":
    main()
