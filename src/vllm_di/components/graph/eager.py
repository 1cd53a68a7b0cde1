"""No graphs: every step calls the model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vllm_di.components.interfaces import GraphPolicy


class EagerGraph(GraphPolicy):
    """Runs the step function as it is."""

    def __init__(self) -> None: ...

    def wrap(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return step
