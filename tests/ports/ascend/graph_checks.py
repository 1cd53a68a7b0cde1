"""The NPU graph policy on a stand-in that records: the order of the calls and their arguments. No
graph is executed. Run in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from tests.ports.ascend.simulated_checks import batch, on_device, parts
from torch import Tensor

from vllm_di.components.interfaces import AttentionSpec, BatchPlan, ModelStep
from vllm_di.components.messages import KvSpec
from vllm_di.ports.ascend.graph import NEEDED, AscendGraph


class Recording:
    """Stands for the graph functions of torch.npu."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.handles = count(1)
        recording = self

        class NPUGraph:
            def replay(self) -> None:
                recording.calls.append(("replay",))

        class ExternalEvent:
            def wait(self, stream: str) -> None:
                recording.calls.append(("wait", stream))

            def reset(self, stream: str) -> None:
                recording.calls.append(("reset", stream))

            def record(self, stream: str) -> None:
                recording.calls.append(("record", stream))

        self.NPUGraph, self.ExternalEvent = NPUGraph, ExternalEvent

    def graph_pool_handle(self) -> str:
        return "pool"

    def Stream(self) -> str:
        return "updates"

    def current_stream(self) -> str:
        return "main"

    @contextmanager
    def graph(self, graph: Any, pool: str) -> Iterator[None]:
        self.calls.append(("capture", pool))
        yield
        self.calls.append(("captured",))

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        self.calls.append(("enter", stream))
        yield
        self.calls.append(("leave", stream))

    def graph_task_group_begin(self, stream: str) -> None:
        self.calls.append(("group begin", stream))

    def graph_task_group_end(self, stream: str) -> int:
        handle = next(self.handles)
        self.calls.append(("group end", stream, handle))
        return handle

    def graph_task_update_begin(self, stream: str, handle: int) -> None:
        self.calls.append(("update begin", stream, handle))

    def graph_task_update_end(self, stream: str) -> None:
        self.calls.append(("update end", stream))


@contextmanager
def recorded() -> Iterator[tuple[Recording, AscendGraph, Any, Any]]:
    """(recording, policy, attention, layout), with the stand-in in torch.npu and each attention
    kernel in the recording."""
    names = ("attention", "kv_layout", "device", "limits", "model")
    with parts("limits.null_block=true", only=names) as c:
        npu, recording = torch.npu, Recording()  # type: ignore[attr-defined]
        for name in NEEDED:
            setattr(npu, name, getattr(recording, name))
        try:
            attention = c.attention()
            paged = attention._paged

            def kernel(
                q: Tensor, key: Tensor, table: Tensor, lengths: list[int], **named: Any
            ) -> Any:
                workspace = named.get("workspace") is not None
                recording.calls.append(("paged", table.tolist(), list(lengths), workspace))
                return paged(q, key, table, lengths, **named)

            attention._paged = kernel
            policy = AscendGraph(
                c.device(), attention, c.kv_layout(), c.limits(), c.model(), sizes=[4, 2]
            )
            yield recording, policy, attention, c.kv_layout()
        finally:
            for name in NEEDED:
                delattr(npu, name)


class TwoLayers:
    """A step that is two attention layers, and remembers the inputs that it was called with."""

    def __init__(self, attention: Any, layout: Any) -> None:
        self.spec = AttentionSpec(2, 2, 64, 0.125)
        specs = [KvSpec(layer=i, num_kv_heads=2, head_size=64) for i in range(2)]
        self.caches = layout.allocate(specs, 9, torch.bfloat16)
        self.attention, self.inputs = attention, list[Any]()

    def __call__(self, step: ModelStep) -> Tensor:
        (metadata,) = step.metadata
        self.inputs.append((step.token_ids, step.positions, metadata))
        x = step.token_ids[:, None, None].expand(-1, 2, 64).to(torch.bfloat16)
        for cache in step.caches:
            x = self.attention.forward(x, x, x, cache, metadata, self.spec)
        return x.flatten(1)


def model_step(plan: BatchPlan, attention: Any, layers: TwoLayers) -> ModelStep:
    metadata = [attention.build(plan)]
    return ModelStep(plan.token_ids, plan.positions, layers.caches, [0, 0], metadata)


def step(policy_run: Any, attention: Any, layers: TwoLayers, past: list[int], first: int) -> Tensor:
    blocks = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32)[: len(past)]
    plan = on_device(batch([1] * len(past), past, blocks))
    plan.token_ids.copy_(torch.arange(first, first + len(past)))
    plan.positions.copy_(torch.tensor(past))
    out: Tensor = policy_run(model_step(plan, attention, layers))
    return out


def check_capture_then_renewal_before_each_replay() -> None:
    with recorded() as (recording, policy, attention, layout):
        layers = TwoLayers(attention, layout)
        run = policy.wrap(layers)
        calls = recording.calls
        out = step(run, attention, layers, past=[5, 7, 9], first=11)
        assert out.shape == (3, 128)
        group = [("wait", "main"), ("reset", "main"), ("group begin", "main")]
        capture = calls[2 : calls.index(("captured",)) + 1]
        assert [c[0] for c in calls[:2]] == ["paged", "paged"]  # every kernel once, before
        assert capture[0] == ("capture", "pool")
        assert capture[1:4] == group and capture[6:9] == group
        assert capture[4][0] == "paged" and capture[4][2:] == ([1, 1, 1, 1], True)
        assert capture[5] == ("group end", "main", 1) and capture[10] == ("group end", "main", 2)
        assert_renewal(calls[calls.index(("captured",)) + 1 :], [6, 8, 10, 1])
        del calls[:]
        step(run, attention, layers, past=[6, 8, 10], first=21)
        assert_renewal(calls, [7, 9, 11, 1])  # nothing is captured again


def assert_renewal(calls: list[tuple[Any, ...]], lengths: list[int]) -> None:
    """Enter the stream of updates; for each task begin, kernel, end, event; leave; replay."""
    assert calls[0] == ("enter", "updates") and calls[-2:] == [("leave", "updates"), ("replay",)]
    inner = calls[1:-2]
    for task in range(2):
        begin, kernel, end, event = inner[4 * task : 4 * task + 4]
        assert begin == ("update begin", "updates", task + 1)
        assert kernel[0] == "paged" and kernel[2] == lengths and kernel[3]
        assert [row[:2] for row in kernel[1]] == [[1, 2], [3, 4], [5, 6], [0, 0]]
        assert end == ("update end", "updates") and event == ("record", "updates")
    assert len(inner) == 8


def check_buffers_hold_this_steps_batch() -> None:
    with recorded() as (_, policy, attention, layout):
        layers = TwoLayers(attention, layout)
        run = policy.wrap(layers)
        step(run, attention, layers, past=[5, 7, 9], first=11)
        token_ids, positions, metadata = layers.inputs[-1]  # those of the capture
        step(run, attention, layers, past=[6, 130, 10], first=21)
        assert token_ids[:3].tolist() == [21, 22, 23] and positions[:3].tolist() == [6, 130, 10]
        assert metadata.slots.tolist() == [128 + 6, 4 * 128 + 2, 5 * 128 + 10, 3]
        assert len(layers.inputs) == 2  # one run before the capture, and the capture


def check_other_steps_run_as_they_stand() -> None:
    with recorded() as (recording, policy, attention, layout):
        layers = TwoLayers(attention, layout)
        run = policy.wrap(layers)
        blocks = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
        for queries, padding in (([3, 1], 0), ([1], 1)):
            plan = on_device(batch(queries, [0] * len(queries), blocks[: len(queries)], padding))
            run(model_step(plan, attention, layers))
        many = torch.arange(1, 6, dtype=torch.int32)[:, None]
        plan = on_device(batch([1] * 5, [0] * 5, many))
        run(model_step(plan, attention, layers))
        assert len(layers.inputs) == 3
        assert not [c for c in recording.calls if c[0] in ("capture", "replay")]
