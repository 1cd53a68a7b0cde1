"""No graphs: every step calls the model."""

from __future__ import annotations

from vllm_di.components.interfaces import GraphPolicy, StepFunction


class EagerGraph(GraphPolicy):
    """Runs the step function as it is."""

    def __init__(self) -> None: ...

    def wrap(self, forward: StepFunction) -> StepFunction:
        return forward
