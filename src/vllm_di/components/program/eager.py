"""A step as a plain call of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_di.components.graph.wrapping import wrapped
from vllm_di.components.interfaces import (
    AttentionBackend,
    BatchPlan,
    GraphPolicy,
    KvLayout,
    LayerCache,
    Model,
    ModelProgram,
    ModelStep,
)
from vllm_di.components.kv_groups import Groups
from vllm_di.components.messages import KvGroup


class EagerProgram(ModelProgram):
    """Metadata, the layers, then the logits of the wanted rows alone."""

    def __init__(
        self, model: Model, attention: AttentionBackend, kv_layout: KvLayout, graph: GraphPolicy
    ) -> None:
        self._build, self._graph, self._layout = attention.build, graph, kv_layout
        self._model, self._last = model, model.last
        self._forward = wrapped(graph, model.forward)
        self._caches: list[LayerCache] = []
        self._groups: list[int] = []

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        layers = Groups(self._model.kv_specs(), groups)
        pool = self._layout.allocate(layers.pool, num_blocks, self._model.dtype)
        self._groups = layers.of_layer
        self._caches = [pool[place] for place in layers.places]

    @property
    def num_compiles(self) -> int:
        return self._graph.num_compiles

    @property
    def caches(self) -> Sequence[LayerCache]:
        return self._caches

    def run(self, plan: BatchPlan) -> Tensor:
        if torch.is_inference_mode_enabled():  # a step; a warm-up enters it here
            return self._run(plan)
        with torch.inference_mode():
            return self._run(plan)

    def _run(self, plan: BatchPlan) -> Tensor:
        plan, out = self._graph.place(plan)
        metadata = [
            self._build(plan.of_group(group), out[group] if out else None)
            for group in range(plan.num_groups)
        ]
        hidden = self._forward(
            ModelStep(
                token_ids=plan.token_ids,
                positions=plan.positions,
                caches=self._caches,
                groups=self._groups,
                metadata=metadata,
                hidden=plan.hidden,
                token_types=plan.token_types,
            )
        )
        if not self._last:
            return hidden
        wanted = len(plan.logits_rows)
        if not wanted:  # chunks of prompts alone: the GEMM of the head is skipped
            return hidden.new_empty((0, self._model.vocab_size), dtype=torch.float32)
        # without padding rows are sorted and unique: if there are as many as tokens, it is all
        every = wanted == len(hidden) and plan.padded_to is None
        return self._model.logits(hidden if every else hidden[plan.logits_rows])
