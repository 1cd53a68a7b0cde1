"""Captured graphs of the simulated device: a list of what torch dispatched, done again.

As on a GPU, a replay reads and writes the memory of its capture, and a captured step may not wait
for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS_THE_HOST = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"})
"""Operators whose result the host needs before it can go on."""


class SimulatedGraph:
    """What ``torch.cuda.CUDAGraph`` is to a GPU. Filled by ``captured_into``."""

    def __init__(self) -> None:
        self._again: list[Callable[[], None]] = []

    def add(self, again: Callable[[], None]) -> None:
        self._again.append(again)

    def replay(self) -> None:
        with torch.no_grad():
            for again in self._again:
                again()


@contextmanager
def captured_into(graph: SimulatedGraph) -> Iterator[None]:
    """Whatever torch dispatches inside is done, and kept in ``graph``. Raises RuntimeError for what
    a GPU would refuse to capture."""
    with _Capture(graph):
        yield


class _Capture(TorchDispatchMode):
    def __init__(self, graph: SimulatedGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, named = func._schema.name, kwargs or {}
        if name in ASKS_THE_HOST:
            raise RuntimeError(f"{name} waits for the device, which a capture does not allow")
        result = func(*args, **named)
        kept = [t for t in tree_leaves(result) if isinstance(t, Tensor)]

        def again() -> None:
            found = [t for t in tree_leaves(func(*args, **named)) if isinstance(t, Tensor)]
            for old, new in zip(kept, found, strict=True):
                if old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self._graph.add(again)
        return result
