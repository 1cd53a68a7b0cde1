"""Several ranks as threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

from vllm_di.components.interfaces import Communicator

T = TypeVar("T")


class ThreadCommunicator(Communicator):
    """Collectives over a list that the ranks share."""

    def __init__(self, rank: int, shared: list[Any], barrier: Barrier) -> None:
        self.rank, self.world_size = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._shared[self.rank] = x.clone()
        self._barrier.wait()
        parts = list(self._shared)
        self._barrier.wait()
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._exchange(x), dim)


def on_ranks(world_size: int, run: Callable[[Communicator], T]) -> list[T]:
    """``run`` on every rank at once; results in rank order. A rank's error frees the others."""
    shared: list[Any] = [None] * world_size
    barrier = Barrier(world_size, timeout=60)

    def guarded(rank: int) -> T:
        try:
            return run(ThreadCommunicator(rank, shared, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(world_size)]
    return [future.result() for future in futures]
