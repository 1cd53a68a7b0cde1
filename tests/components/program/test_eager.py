from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.components.model_runner.fakes import CountingModel, PlanAttention
from torch import Tensor

from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import BatchPlan, GraphPolicy, Model, ModelStep, StepFunction
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.program.eager import EagerProgram

VOCAB = 11


class Recorded(GraphPolicy):
    """Notes what it is asked, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def wrap(self, forward: StepFunction) -> StepFunction:
        self.events.append("wrap")

        def wrapped(step: ModelStep) -> Tensor:
            self.events.append("step")
            return forward(step)

        return wrapped

    def place(self, plan: BatchPlan) -> tuple[BatchPlan, Sequence[Any]]:
        self.events.append("place")
        return super().place(plan)


class Rows(CountingModel):
    """Hidden states are row numbers; remembers how many rows got logits."""

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB)
        self.rows: list[int] = []

    def forward(self, step: ModelStep) -> Tensor:
        assert torch.is_inference_mode_enabled()
        return torch.arange(len(step.token_ids), dtype=torch.float32)[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return hidden.expand(-1, VOCAB).clone()


def program(model: Model, graph: GraphPolicy) -> EagerProgram:
    layout = HndLayout(
        HostDevice(threads=1, memory_budget=None, default_dtype="float32"),
        block_size=16,
        dtype="auto",
    )
    return EagerProgram(model, PlanAttention(), layout, graph)


def plan(tokens: int, rows: list[int]) -> BatchPlan:
    return BatchPlan(
        token_ids=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.arange(tokens),
        query_start=torch.tensor([0, tokens], dtype=torch.int32),
        seq_lens=torch.tensor([tokens], dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=torch.full((tokens,), -1),
        logits_rows=torch.tensor(rows, dtype=torch.int64),
        query_lens_host=[tokens],
        seq_lens_host=[tokens],
    )


@pytest.mark.parametrize("rows", [[4], [0, 2, 3], [0, 1, 2, 3, 4]])
def test_only_the_wanted_rows_get_logits(rows: list[int]) -> None:
    model = Rows()
    logits = program(model, Recorded()).run(plan(5, rows))
    assert logits[:, 0].tolist() == rows
    assert logits.shape == (len(rows), VOCAB)
    assert model.rows == [len(rows)]


def test_chunks_of_prompts_alone_cost_no_product_with_the_vocabulary() -> None:
    model = Rows()
    logits = program(model, Recorded()).run(plan(5, []))
    assert logits.shape == (0, VOCAB) and logits.dtype == torch.float32
    assert model.rows == []


def test_the_graph_policy_is_asked_before_each_step() -> None:
    graph = Recorded()
    asked = program(Rows(), graph)
    asked.run(plan(2, [1]))
    asked.run(plan(1, [0]))
    assert graph.events == ["wrap", *["place", "step"] * 2]
