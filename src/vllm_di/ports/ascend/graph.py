"""Decode steps captured as NPU graphs.

The attention kernel takes the sequences' lengths on the host, so a captured one would keep those of
the capture for ever. It is therefore captured as a task group of its own, behind an event: before
each replay the task is issued again with this step's lengths, on another stream, and the event lets
the graph go on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    AttentionBackend,
    Device,
    GraphPolicy,
    KvLayout,
    Model,
    ModelStep,
    SchedulerLimits,
    StepFunction,
)
from vllm_di.errors import ConfigError
from vllm_di.ports.ascend.attention import AscendAttention, Issue, Metadata
from vllm_di.ports.ascend.vendor import require

NEEDED = (
    "NPUGraph",
    "graph",
    "graph_pool_handle",
    "graph_task_group_begin",
    "graph_task_group_end",
    "graph_task_update_begin",
    "graph_task_update_end",
    "ExternalEvent",
    "Stream",
    "stream",
    "current_stream",
)
"""Of ``torch.npu``."""


@dataclass(frozen=True, slots=True)
class Task:
    """One attention kernel inside a graph."""

    issue: Issue
    handle: Any
    event: Any


@dataclass(slots=True)
class Captured:
    """A graph for a number of sequences, and the buffers that it reads and writes."""

    graph: Any
    tasks: list[Task]
    token_ids: Tensor  # [size] int64
    positions: Tensor  # [size] int64
    metadata: Metadata
    result: Tensor  # [size, hidden]


class AscendGraph(GraphPolicy):
    """One graph for each of ``sizes``, captured when first wanted; a decode of fewer sequences is
    padded with rows that write to block 0, which the scheduler keeps free. Other steps run as they
    stand.
    """

    def __init__(
        self,
        device: Device,
        attention: AttentionBackend,
        kv_layout: KvLayout,
        limits: SchedulerLimits,
        model: Model,
        *,
        sizes: list[Annotated[int, msgspec.Meta(ge=1)]],
    ) -> None:
        if not isinstance(attention, AscendAttention):
            raise ConfigError(
                f"graph=ascend renews the lengths of attention=ascend before each replay, and "
                f"{type(attention).__name__} has no such task; take graph=eager"
            )
        if not limits.report().null_block:
            raise ConfigError("graph=ascend pads into block 0; set limits.null_block=true")
        if not sizes or max(sizes) > kv_layout.block_size:
            raise ConfigError(
                f"sizes {sizes}: from 1 to {kv_layout.block_size}, the slots of the block that "
                "padding is written to"
            )
        self._npu = getattr(torch, device.torch_device.type)
        missing = [name for name in NEEDED if not hasattr(self._npu, name)]
        if missing:
            raise ConfigError(
                f"graph=ascend: torch.{device.torch_device.type} has no {', '.join(missing)} (a "
                "simulated device has no graphs); take graph=eager"
            )
        require(device, "atb::_npu_paged_attention_v2_get_workspace")
        self._device, self._sizes = device.torch_device, sorted(sizes)
        self._max_blocks = -(-model.max_model_len // kv_layout.block_size)
        self._graphs: dict[int, Captured] = {}
        self._pool = self._npu.graph_pool_handle()
        self._updates = self._npu.Stream()

    def wrap(self, forward: StepFunction) -> StepFunction:
        def run(step: ModelStep) -> Tensor:
            metadata: Metadata = step.metadata[0]
            count = len(metadata.lengths)
            size = next((s for s in self._sizes if s >= count), None)
            decodes = not metadata.prefills and metadata.written is None
            others = len(step.metadata) > 1 or step.hidden is not None
            if size is None or not decodes or others or len(step.token_ids) != count:
                return forward(step)
            if size not in self._graphs:
                self._graphs[size] = self._capture(forward, step, size)
            captured = self._graphs[size]
            self._fill(captured, step)
            self._renew(captured, metadata.lengths + [1] * (size - count))
            captured.graph.replay()
            return captured.result[:count]

        return run

    def _capture(self, forward: StepFunction, step: ModelStep, size: int) -> Captured:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        token_ids, positions, tasks = zeros(size), zeros(size), list[Task]()
        metadata = Metadata(
            written=None,
            slots=torch.arange(size, dtype=torch.int32, device=self._device),
            block_table=zeros(size, self._max_blocks, dtype=torch.int32),
            lengths=[1] * size,
            ends=list(range(1, size + 1)),
            prefills=[],
            decodes=list(range(size)),
        )
        blank = replace(step, token_ids=token_ids, positions=positions, metadata=[metadata])
        forward(blank)  # loads every kernel, outside the capture
        metadata.tasks = lambda issue, lengths: tasks.append(self._task(issue, lengths))
        graph = self._npu.NPUGraph()
        with self._npu.graph(graph, pool=self._pool):
            result = forward(blank)
        return Captured(graph, tasks, token_ids, positions, metadata, result)

    def _task(self, issue: Issue, lengths: list[int]) -> Task:
        """Capture one kernel as a task group that waits for its renewal."""
        stream, event = self._npu.current_stream(), self._npu.ExternalEvent()
        event.wait(stream)
        event.reset(stream)
        self._npu.graph_task_group_begin(stream)
        issue(lengths)
        return Task(issue, self._npu.graph_task_group_end(stream), event)

    def _fill(self, captured: Captured, step: ModelStep) -> None:
        """This step's batch into the graph's buffers; what padding is left writes to block 0."""
        count, held = len(step.token_ids), captured.metadata
        metadata: Metadata = step.metadata[0]
        captured.token_ids[:count].copy_(step.token_ids)
        captured.positions[:count].copy_(step.positions)
        held.slots[:count].copy_(metadata.slots)
        padding = torch.arange(count, len(held.slots), dtype=torch.int32, device=self._device)
        held.slots[count:].copy_(padding)
        held.block_table[:count, : metadata.block_table.shape[1]].copy_(metadata.block_table)
        held.block_table[count:].zero_()

    def _renew(self, captured: Captured, lengths: list[int]) -> None:
        """Issue every attention task again, with this step's lengths."""
        with self._npu.stream(self._updates):
            for task in captured.tasks:
                self._npu.graph_task_update_begin(self._updates, task.handle)
                task.issue(lengths)
                self._npu.graph_task_update_end(self._updates)
                task.event.record(self._updates)

    def close(self) -> None:
        self._graphs.clear()
