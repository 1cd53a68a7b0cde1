from __future__ import annotations

import torch

from vllm_di.components.graph.eager import EagerGraph


def test_the_step_runs_as_it_is_and_nothing_is_captured() -> None:
    graph = EagerGraph()

    def step() -> torch.Tensor:
        return torch.ones(1)

    assert graph.wrap(step) is step
    runs: list[int] = []
    graph.capture([1, 2], runs.append)
    assert runs == []
