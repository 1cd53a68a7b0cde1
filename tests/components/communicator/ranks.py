"""Ranks over shared memory: as threads of this process, or as processes that also join gloo."""

from __future__ import annotations

import multiprocessing
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

import torch
from torch import Tensor

from vllm_di.components.communicator.shared_memory import SharedMemoryCommunicator
from vllm_di.components.communicator.torch_distributed import TorchDistributedCommunicator
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import Communicator, Placement
from vllm_di.components.transport import GroupStore

T = TypeVar("T")


def free_address() -> str:
    """The name of a group that nobody is in; shared memory opens no file."""
    return f"file:///nowhere/{uuid.uuid4()}"


def join(placement: Placement, **more: Any) -> SharedMemoryCommunicator:
    device = HostDevice(placement, threads=1, memory_budget=None, default_dtype="float32")
    settings: dict[str, Any] = {"piece": "4KiB", "spin": 20, "timeout": 60, "cache": None} | more
    return SharedMemoryCommunicator(placement, device, **settings)


def on_threads(
    world: int, run: Callable[[SharedMemoryCommunicator], T], **settings: Any
) -> list[T]:
    """``run`` on every rank at once; results in rank order."""
    store = GroupStore()

    def one(rank: int) -> T:
        communicator = join(Placement(rank, world, store.address), **settings)
        try:
            return run(communicator)
        finally:
            communicator.close()

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(one, rank) for rank in range(world)]
    store.close()
    return [future.result() for future in futures]


def on_processes(world: int, run: Callable[..., T]) -> list[T]:
    """``run(shared, gloo)`` in a process for each rank; its results must be plain."""
    context = multiprocessing.get_context("spawn")
    with (
        closing(GroupStore()) as store,
        closing(GroupStore()) as gloo,
        context.Pool(world) as pool,
    ):
        jobs = [(Placement(rank, world, store.address), gloo.address, run) for rank in range(world)]
        return pool.starmap(_both, jobs, chunksize=1)


def _both(placement: Placement, gloo: str, run: Callable[..., T]) -> T:
    device = HostDevice(placement, threads=1, memory_budget=None, default_dtype="float32")
    shared = join(placement)
    other = TorchDistributedCommunicator(
        Placement(placement.rank, placement.world_size, gloo), device, backend="gloo", timeout=60
    )
    try:
        return run(shared, other)
    finally:
        other.close()
        shared.close()


def values(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """Known to all ranks."""
    generator = torch.Generator().manual_seed(7 + rank)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(-100, 100, (count,), generator=generator).to(dtype)


def same_as_gloo(shared: Communicator, gloo: Communicator) -> list[str]:
    """-> the collectives that differ from gloo's, on this rank."""
    bad = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64):
        for shape in ((6,), (6, 50), (6, 7, 1201)):
            x = values(shared.rank, torch.Size(shape).numel(), dtype).view(shape)
            exact = not dtype.is_floating_point or shared.world_size == 2
            pairs = {
                "all_reduce": [c.all_reduce(x.clone()) for c in (shared, gloo)],
                "all_gather": [c.all_gather(x) for c in (shared, gloo)],
                "all_gather 0": [c.all_gather(x, 0) for c in (shared, gloo)],
            }
            for name, (got, want) in pairs.items():
                if got.shape != want.shape or got.dtype != want.dtype:
                    bad.append(f"{name} {dtype} {shape}: {got.shape} {got.dtype}")
                elif exact or "reduce" not in name:
                    bad += [] if torch.equal(got, want) else [f"{name} {dtype} {shape}"]
                else:  # another order of summation
                    bound = 3 * torch.finfo(dtype).eps * 12
                    bad += [] if (got - want).abs().max() <= bound else [f"{name} {dtype} {shape}"]
    return bad


def meet(communicator: Communicator) -> None:
    """Return when every rank has come here."""
    communicator.all_reduce(torch.ones(1))


def dies(address: str, rank: int, world: int, after: float) -> None:
    """Joins, takes part once, and is gone without a word."""
    communicator = join(Placement(rank, world, address))
    meet(communicator)
    time.sleep(after)
    os.kill(os.getpid(), 9)
