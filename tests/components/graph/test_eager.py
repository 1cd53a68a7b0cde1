from __future__ import annotations

import torch

from vllm_di.components.graph.eager import EagerGraph
from vllm_di.components.interfaces import ModelStep


def test_the_step_runs_as_it_is_and_nothing_is_captured() -> None:
    graph = EagerGraph()

    def forward(step: ModelStep) -> torch.Tensor:
        return torch.ones(1)

    assert graph.wrap(forward) is forward
    runs: list[int] = []
    graph.capture([1, 2], runs.append)
    assert runs == []
