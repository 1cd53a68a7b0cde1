"""A step as a plain call of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    AttentionBackend,
    BatchPlan,
    GraphPolicy,
    LayerCache,
    Model,
    ModelProgram,
)


class EagerProgram(ModelProgram):
    """Metadata, the layers, then the logits of the wanted rows alone."""

    def __init__(self, model: Model, attention: AttentionBackend, graph: GraphPolicy) -> None:
        self._build, self._graph = attention.build, graph
        self._logits, self._vocab_size, self._last = model.logits, model.vocab_size, model.last
        self._forward = graph.wrap(_first(model) if model.first else model.forward)

    @torch.inference_mode()
    def run(self, plan: BatchPlan, caches: Sequence[LayerCache]) -> Tensor:
        plan, out = self._graph.place(plan)
        metadata: Any = self._build(plan, out)
        self._graph.before_replay(metadata)
        hidden = self._forward(plan.token_ids, plan.positions, caches, metadata, plan.hidden)
        if not self._last:
            return hidden
        wanted = len(plan.logits_rows)
        if not wanted:  # chunks of prompts alone: no product with the vocabulary
            return hidden.new_empty((0, self._vocab_size), dtype=torch.float32)
        # the rows stand in order, each once: as many as there are tokens are all of them
        return self._logits(hidden if wanted == len(hidden) else hidden[plan.logits_rows])


def _first(model: Model) -> Callable[..., Tensor]:
    """The first stage takes no hidden states: a model written for interfaces 1.0 knows of none."""
    forward = model.forward

    def step(
        token_ids: Tensor,
        positions: Tensor,
        caches: Sequence[LayerCache],
        metadata: Any,
        hidden: Tensor | None = None,
    ) -> Tensor:
        return forward(token_ids, positions, caches, metadata)

    return step
