"""Ranks as processes: each opens its communicator and runs every collective once."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import msgspec
import torch

from vllm_di.components.interfaces import Communicator, Placement
from vllm_di.components.transport import GroupStore
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer

SECONDS = 120.0
"""The longest that ranks may take together."""


class Answers(msgspec.Struct, kw_only=True):
    """One rank's results. Rank r contributes [10 r, 10 r + 1, 10 r + 2, 10 r + 3]."""

    rank: int
    world_size: int
    all_reduce: list[int] = []
    all_gather: list[int] = []
    all_gather_rows: list[list[int]] = []
    float_sum: list[float] = []
    float_expected: list[float] = []
    noticed_after: float | None = None
    """Seconds until a collective without its peer failed."""
    error: str | None = None


def on_ranks(assembly: Assembly, world: int, *, deserter: int | None = None) -> list[Answers]:
    """Every rank's results. A ``deserter`` dies before a last collective and gives none. Raises
    AssertionError for a rank that failed or did not end."""
    if world == 1:
        return [_collectives(assembly, Placement())]
    store = GroupStore()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", __name__])
    results = context.SimpleQueue()
    arguments = [
        (assembly.encode(), rank, world, store.address, deserter, results) for rank in range(world)
    ]
    processes = [context.Process(target=_rank, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    found: list[Answers] = []
    deadline = time.monotonic() + SECONDS
    try:
        wanted = world - (deserter is not None)
        while len(found) < wanted and time.monotonic() < deadline:
            if results.empty():
                time.sleep(0.005)
            else:
                found.append(msgspec.json.decode(results.get(), type=Answers))
    finally:
        for process in processes:
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()
        results.close()
        store.close()
    errors = [f"rank {one.rank}: {one.error}" for one in found if one.error]
    assert not errors, "; ".join(errors)
    assert len(found) == wanted, f"{wanted - len(found)} of {world} ranks gave no answer"
    return sorted(found, key=lambda one: one.rank)


def _rank(
    encoded: bytes, rank: int, world: int, rendezvous: str, deserter: int | None, results: Any
) -> None:
    placement = Placement(rank, world, rendezvous)
    try:
        assembly = Assembly.decode(encoded)
        answers = (
            _collectives(assembly, placement)
            if deserter is None
            else _deserted(assembly, placement, deserter)
        )
    except Exception as error:
        answers = Answers(rank=rank, world_size=world, error=f"{type(error).__name__}: {error}")
    results.put(msgspec.json.encode(answers))


def _collectives(assembly: Assembly, placement: Placement) -> Answers:
    rank, world = placement.rank, placement.world_size
    with opened(
        WorkerContainer, assembly, only=["communicator", "device"], placement=placement
    ) as container:
        group: Communicator = container.communicator()
        device = container.device().torch_device

        def own() -> torch.Tensor:
            return torch.arange(4, dtype=torch.int64, device=device) + 10 * rank

        floats = _floats(world)
        found = Answers(rank=group.rank, world_size=group.world_size)
        found.all_reduce = group.all_reduce(own()).tolist()
        found.all_gather = group.all_gather(own()).tolist()
        found.all_gather_rows = group.all_gather(own().view(2, 2), dim=1).tolist()
        found.float_sum = group.all_reduce(floats[rank].clone().to(device)).tolist()
        found.float_expected = floats.double().sum(0).tolist()
        return found


def _deserted(assembly: Assembly, placement: Placement, deserter: int) -> Answers:
    found = Answers(rank=placement.rank, world_size=placement.world_size)
    with opened(
        WorkerContainer, assembly, only=["communicator", "device"], placement=placement
    ) as container:
        group, device = container.communicator(), container.device().torch_device
        group.all_reduce(torch.ones(4, device=device))  # nobody dies before all have joined
        if placement.rank == deserter:
            os._exit(9)
        begin = time.monotonic()
        try:
            group.all_reduce(torch.ones(4, device=device))
        except Exception:
            found.noticed_after = time.monotonic() - begin
    return found


def _floats(world: int) -> torch.Tensor:
    """[world, 33], the same in every process."""
    return torch.randn(world, 33, generator=torch.Generator().manual_seed(11))
