"""Any communicator, with collectives that a traced step can hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from vllm_di.components.communicator import marks
from vllm_di.components.interfaces import Communicator


class MarkedCommunicator(Communicator):
    """Calls ``inner``; while a step is traced it leaves marks instead."""

    def __init__(self, *, inner: Communicator) -> None:
        self._inner, self._marks = inner, False
        self.rank, self.world_size = inner.rank, inner.world_size

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._marks:
            reduced: Tensor = marks.all_reduce(x, marks.GROUP, self.world_size)
            return reduced
        return self._inner.all_reduce(x)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        if self._marks:
            gathered: Tensor = marks.all_gather(x, dim, marks.GROUP, self.world_size)
            return gathered
        return self._inner.all_gather(x, dim)

    @contextmanager
    def export(self) -> Iterator[None]:
        self._marks = self.world_size > 1
        try:
            yield
        finally:
            self._marks = False

    def close(self) -> None:
        self._inner.close()
