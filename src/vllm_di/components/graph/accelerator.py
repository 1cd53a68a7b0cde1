"""Decode steps as graphs of an accelerator: captured once for each size, replayed in one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from vllm_di.components.graph.reuse import unable
from vllm_di.components.interfaces import (
    AttentionBackend,
    BatchPlan,
    Device,
    GraphPolicy,
    GroupTables,
    KvLayout,
    Model,
    ModelStep,
    Quantization,
    StepFunction,
)
from vllm_di.errors import ConfigError

log = logging.getLogger(__name__)
Count = Annotated[int, msgspec.Meta(ge=1)]


class Captured:
    """One size: the inputs that its graph reads, the graph, and the output that it writes."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self.metadata: Sequence[Any] = ()  # of each KvGroup
        self.graph: Any = None
        self.output: Tensor | None = None


class AcceleratorGraph(GraphPolicy):
    """Replays steps in which each sequence has one token, through the graphs of ``torch.cuda`` or
    another module of torch that has them (``graph_class`` is their name there).

    A step is captured for each size that the shape policy warms up, up to ``max_tokens``, so that
    ``shapes`` should pad to these sizes. Before a replay the plan is copied to where the graph
    reads; what is beyond its last sequence becomes padding: a query that sees nothing and whose
    key is dropped. Any other step runs as it stands, and the log says so once. Nothing is captured
    where a part of the step cannot be captured; the log says which.
    """

    def __init__(
        self,
        device: Device,
        kv_layout: KvLayout,
        attention: AttentionBackend,
        quantization: Quantization,
        model: Model,
        *,
        graph_class: str,
        max_tokens: Count,
    ) -> None:
        self._device, self._max_tokens = device, max_tokens
        self._module = getattr(torch, device.torch_device.type)
        if not hasattr(self._module, graph_class):
            raise ConfigError(
                f"graph_class: {self._module.__name__} has no {graph_class}; choose graph=eager"
            )
        self._graph_class: Callable[[], Any] = getattr(self._module, graph_class)
        self._columns = -(-model.max_model_len // kv_layout.block_size)
        self._hidden = None if model.first else (model.hidden_size, model.dtype)
        self._captured: dict[int, Captured] = {}
        self._capturing = 0
        """Size of the step that is being captured; 0 for none."""
        self._pool: Any = None
        self._told = False
        reasons = unable("capture", attention=attention, quantization=quantization, model=model)
        self.reason = "; ".join(reasons)
        """Why nothing is captured; empty when steps are."""

    def capture(self, sizes: Sequence[int], run: Callable[[int], object]) -> None:
        """Captures the largest size first: the smaller ones then fit into its memory. Raises
        ConfigError for a step that cannot be captured."""
        if self.reason:
            log.info("steps are not captured: %s", self.reason)
            return
        wanted = sorted({size for size in sizes if size <= self._max_tokens}, reverse=True)
        for size in wanted:
            self._capturing = size
            try:
                run(size)
            finally:
                self._capturing = 0
        if wanted:
            log.info("captured decode steps of %s tokens", ", ".join(map(str, wanted[::-1])))

    def place(self, plan: BatchPlan) -> tuple[BatchPlan, Sequence[Any]]:
        size = len(plan.token_ids)
        if self._capturing:
            self._captured[size] = Captured(self._static_plan(size, plan.num_groups))
        captured = self._captured.get(size)
        if captured is None or plan.max_query_len > 1:
            if captured is None and plan.max_query_len <= 1 and self._captured and not self._told:
                self._told = True
                log.info("a decode step of %d tokens is not captured; it runs as it stands", size)
            return plan, ()
        self._copy(plan, captured.plan)
        return captured.plan, captured.metadata

    def wrap(self, forward: StepFunction) -> StepFunction:
        def run(step: ModelStep) -> Tensor:
            captured = self._captured.get(len(step.token_ids))
            if captured is None or step.token_ids is not captured.plan.token_ids:
                return forward(step)
            if captured.graph is None:
                captured.metadata = step.metadata
                self._record(captured, lambda: forward(step))
            captured.graph.replay()
            assert captured.output is not None
            return captured.output

        return run

    def close(self) -> None:
        self._captured.clear()
        self._pool = None

    def _record(self, captured: Captured, step: Callable[[], Tensor]) -> None:
        step()  # kernels are compiled and libraries set up outside of the capture
        self._device.synchronize()
        graph = self._graph_class()
        if self._pool is None:
            self._pool = self._module.graph_pool_handle()
        try:
            with self._module.graph(graph, pool=self._pool):
                captured.output = step()
        except Exception as error:  # drivers raise many types
            raise ConfigError(
                f"a step of {len(captured.plan.token_ids)} tokens cannot be captured: {error}; "
                "choose graph=eager",
                key="graph",
            ) from error
        captured.graph = graph

    def _static_plan(self, size: int, num_groups: int) -> BatchPlan:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return self._device.zeros(shape, dtype)

        def tables() -> GroupTables:
            return GroupTables(
                seq_lens=zeros(size, dtype=torch.int32),
                block_table=zeros(size, self._columns, dtype=torch.int32),
                slot_mapping=zeros(size, dtype=torch.int64),
                seq_lens_host=[],
            )

        first, *others = [tables() for _ in range(num_groups)]
        starts = torch.arange(size + 1, dtype=torch.int32)
        return BatchPlan(
            token_ids=zeros(size, dtype=torch.int64),
            positions=zeros(size, dtype=torch.int64),
            query_start=starts.to(self._device.torch_device),
            seq_lens=first.seq_lens,
            block_table=first.block_table,
            slot_mapping=first.slot_mapping,
            more_groups=others,
            logits_rows=zeros(size, dtype=torch.int64),
            hidden=None
            if self._hidden is None
            else zeros(size, self._hidden[0], dtype=self._hidden[1]),
        )

    def _copy(self, plan: BatchPlan, static: BatchPlan) -> None:
        """Copy ``plan`` of n sequences into ``static``, which has n or more."""
        static.token_ids.copy_(plan.token_ids, non_blocking=True)
        static.positions.copy_(plan.positions, non_blocking=True)
        _copy_tables(plan, static)
        for tables, static_tables in zip(plan.more_groups, static.more_groups, strict=True):
            _copy_tables(tables, static_tables)
        if static.hidden is not None and plan.hidden is not None:
            static.hidden.copy_(plan.hidden, non_blocking=True)
        static.query_lens_host = [1] * len(static.seq_lens)
        static.logits_rows = plan.logits_rows


def _copy_tables(tables: BatchPlan | GroupTables, static: BatchPlan | GroupTables) -> None:
    count, columns = tables.block_table.shape
    static.slot_mapping.copy_(tables.slot_mapping, non_blocking=True)
    static.block_table[:count, :columns].copy_(tables.block_table, non_blocking=True)
    static.seq_lens[:count].copy_(tables.seq_lens, non_blocking=True)
    static.seq_lens[count:].zero_()
    static.seq_lens_host = [*tables.seq_lens_host, *[0] * (len(static.seq_lens) - count)]
