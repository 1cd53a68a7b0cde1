"""AcceleratorGraph against a stand-in for torch's graphs that records what it is told.

The stand-in keeps the captured step and runs it again at a replay, on whatever its inputs hold by
then, into the tensor that the capture gave: what a graph does.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.components.model_runner.fakes import CountingModel
from torch import Tensor

from vllm_di.components.attention.paged import PagedAttention
from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.device.host import HostDevice
from vllm_di.components.graph.accelerator import AcceleratorGraph
from vllm_di.components.interfaces import BatchPlan, ModelStep
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.errors import ConfigError

COLUMNS = 8
"""Blocks of the longest sequence: 32 tokens in blocks of 4."""


class Graph:
    """One graph. ``module.recording`` is the one that steps go to while it is captured."""

    step: Callable[[], Tensor] | None = None
    output: Tensor | None = None

    def replay(self) -> None:
        assert self.step is not None and self.output is not None
        MODULE.calls.append("replay")
        self.output.copy_(self.step())


class Module(types.ModuleType):
    """Stands for ``torch.cpu``, so that tensors are the host's."""

    CUDAGraph = Graph

    def __init__(self) -> None:
        super().__init__("torch.cpu")
        self.calls: list[Any] = []
        self.recording: Graph | None = None

    def graph_pool_handle(self) -> str:
        self.calls.append("pool")
        return "the pool"

    @contextmanager
    def graph(self, graph: Graph, pool: str) -> Iterator[None]:
        assert self.recording is None, "one capture at a time"
        self.calls.append(("capture", pool))
        self.recording = graph
        yield
        self.recording = None


MODULE = Module()


class Step:
    """A step that sums what it reads of its inputs into each row, and remembers its calls."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.fails = False

    def __call__(self, step: ModelStep) -> Tensor:
        token_ids, positions = step.token_ids, step.positions
        plan: BatchPlan = step.metadata[0]
        self.sizes.append(len(token_ids))

        def run() -> Tensor:
            seen = token_ids + 10 * positions + 100 * plan.slot_mapping
            rows = len(plan.seq_lens)
            # blocks beyond a sequence's length are nobody's business
            used = torch.arange(plan.block_table.shape[1]) * 4 < plan.seq_lens[:, None]
            seen[:rows] += 1000 * plan.seq_lens + 10000 * (plan.block_table * used).sum(-1)
            return seen[:, None].float()

        if MODULE.recording is None:
            return run()
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        MODULE.recording.step, MODULE.recording.output = run, run()
        return MODULE.recording.output


def decodes(count: int, padded: int, *, base: int = 0, columns: int = 3) -> BatchPlan:
    """``count`` sequences of one token, padded as CaptureSizes and Batch do it."""
    rows = torch.arange(padded)
    is_token = rows < count
    return BatchPlan(
        token_ids=torch.where(is_token, rows + base + 1, 0),
        positions=torch.where(is_token, rows + base + 2, 0),
        query_start=torch.arange(count + 1, dtype=torch.int32),
        seq_lens=torch.arange(count, dtype=torch.int32) + base + 3,
        block_table=torch.full((count, columns), base + 1, dtype=torch.int32),
        slot_mapping=torch.where(is_token, rows + base, -1),
        logits_rows=torch.arange(count),
        query_lens_host=[1] * count,
        seq_lens_host=[base + 3 + i for i in range(count)],
    )


def model_step(plan: BatchPlan, metadata: Sequence[Any]) -> ModelStep:
    return ModelStep(plan.token_ids, plan.positions, [], [], metadata, plan.hidden)


class Runner:
    """What program and model runner do with a graph."""

    def __init__(self, graph: AcceleratorGraph) -> None:
        self.graph, self.step = graph, Step()
        self.run = graph.wrap(self.step)

    def __call__(self, plan: BatchPlan) -> Tensor:
        plan, out = self.graph.place(plan)
        return self.run(model_step(plan, out or [plan]))

    def eager(self, plan: BatchPlan) -> Tensor:
        return self.step(model_step(plan, [plan]))

    def capture(self, *sizes: int) -> None:
        self.graph.capture(sizes, lambda size: self(decodes(size, size)))
        self.step.sizes.clear()
        MODULE.calls.clear()


class DeviceOps(TorchOps):
    """The reference as a device's library would have it: nothing is asked of the host."""

    asks_host = frozenset()


def policy(
    max_tokens: int = 8, attention: type = PagedAttention, graph_class: str = "CUDAGraph"
) -> AcceleratorGraph:
    device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
    layout = HndLayout(device, block_size=4, dtype="auto")
    ops = DeviceOps()
    model = CountingModel(max_model_len=4 * COLUMNS)
    model.reuses = frozenset({"capture"})
    quantization = NoQuantization(ops)
    return AcceleratorGraph(
        device,
        layout,
        SdpaAttention(layout) if attention is SdpaAttention else attention(ops, layout),
        quantization,
        model,
        graph_class=graph_class,
        max_tokens=max_tokens,
    )


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cpu", MODULE)
    MODULE.calls.clear()
    MODULE.recording = None


def test_sizes_are_captured_once_from_the_largest_into_one_pool() -> None:
    runner = Runner(policy())
    runner.graph.capture([1, 2, 4, 16], lambda size: runner(decodes(size, size)))
    # each once as it stands, to compile, and once into its graph; 16 is beyond max_tokens
    assert runner.step.sizes == [4, 4, 2, 2, 1, 1]
    capture = ("capture", "the pool")
    assert MODULE.calls == ["pool", capture, "replay", capture, "replay", capture, "replay"]


def test_a_replay_sees_this_steps_inputs_and_gives_what_the_step_gives() -> None:
    runner = Runner(policy())
    runner.capture(1, 2, 4)
    for base in (0, 5, 2):
        for count in (1, 2, 4):
            plan = decodes(count, count, base=base, columns=2 + base)
            got = runner(plan).clone()
            assert torch.equal(got, runner.eager(plan))
    assert MODULE.calls == ["replay"] * 9


def test_padding_hides_what_the_last_step_left() -> None:
    runner = Runner(policy())
    runner.capture(4)
    runner(decodes(4, 4, base=7, columns=COLUMNS))  # full: every static input is set
    got = runner(decodes(2, 4, base=1)).clone()
    assert torch.equal(got[:2], runner.eager(decodes(2, 4, base=1))[:2])
    static, metadata = runner.graph.place(decodes(2, 4, base=1))
    assert list(metadata) == [static]
    assert static.seq_lens.tolist() == [4, 5, 0, 0]
    assert static.slot_mapping.tolist() == [1, 2, -1, -1]
    assert static.query_start.tolist() == [0, 1, 2, 3, 4]
    assert static.query_lens_host == [1, 1, 1, 1] and static.seq_lens_host == [4, 5, 0, 0]
    assert static.logits_rows.tolist() == [0, 1]


def test_addresses_never_change() -> None:
    runner = Runner(policy())
    runner.capture(4)

    def addresses() -> list[int]:
        static, _ = runner.graph.place(decodes(3, 4))
        names = ("token_ids", "positions", "query_start", "seq_lens", "block_table", "slot_mapping")
        return [getattr(static, name).data_ptr() for name in names]

    before = addresses()
    runner(decodes(4, 4, base=9))
    assert addresses() == before


def test_prefills_and_uncaptured_sizes_run_as_they_stand(caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner(policy())
    runner.capture(1, 4)
    caplog.set_level("INFO")
    prefill = decodes(1, 4)
    prefill.query_lens_host, prefill.seq_lens_host = [4], [4]
    assert runner.graph.place(prefill) == (prefill, ())
    assert torch.equal(runner(prefill), runner.eager(prefill))
    assert not caplog.messages
    for size in (6, 7):
        plan = decodes(size, size)
        assert torch.equal(runner(plan), runner.eager(plan))
    assert caplog.messages == ["a decode step of 6 tokens is not captured; it runs as it stands"]
    assert "replay" not in MODULE.calls


def test_a_part_that_cannot_be_captured_keeps_steps_as_they_stand(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    graph = policy(attention=SdpaAttention)
    runner = Runner(graph)
    runner.capture(1, 2)
    assert "attention cannot be captured" in caplog.text
    assert torch.equal(runner(decodes(2, 2)), runner.eager(decodes(2, 2)))
    assert MODULE.calls == []


def test_a_step_that_cannot_be_captured_is_an_error_that_names_the_way_out() -> None:
    runner = Runner(policy())
    runner.step.fails = True
    with pytest.raises(ConfigError, match=r"step of 4 tokens cannot be captured: operation not"):
        runner.graph.capture([4], lambda size: runner(decodes(size, size)))


def test_a_module_without_graphs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch\.cpu has no NPUGraph; choose graph=eager"):
        policy(graph_class="NPUGraph")
