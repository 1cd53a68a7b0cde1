"""The worker with fakes around it: what it asks of them, in what order, and how it sizes the
cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.components.model_runner.fakes import CountingModel, PlanAttention

from vllm_di.components.interfaces import (
    BatchPlan,
    CacheTensor,
    Device,
    DeviceMemory,
    KvLayout,
    LayerCache,
    Loader,
    Model,
    ModelProgram,
    ModelRunner,
    Placement,
)
from vllm_di.components.limits.standard import StandardLimits
from vllm_di.components.messages import CacheSize, KvGroup, KvSpec, StepInput, StepPlan, StepResult
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.worker.standard import CacheBounds, StandardWorker
from vllm_di.errors import CheckpointError, ConfigError

BLOCK = 16
BLOCK_BYTES = 1000
FREE = 1_000_000
GROUPS = [KvGroup([0])]


class SmallDevice(Device):
    torch_device = torch.device("cpu")
    default_dtype = torch.float32
    supported_dtypes = (torch.float32,)

    def __init__(self, events: list[str], free: int | None) -> None:
        self._events, self._free = events, free

    def memory(self) -> DeviceMemory | None:
        self._events.append("memory")
        if self._free is None:
            return None
        return DeviceMemory(free=self._free, total=2 * self._free)

    def synchronize(self) -> None:
        self._events.append("synchronize")


class Pages(KvLayout):
    """A layout of nothing but sizes."""

    name, block_size = "pages", BLOCK

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes

    def bytes_per_block(self, specs: Sequence[KvSpec], dtype: torch.dtype) -> int:
        assert len(specs) == 1 and dtype == torch.float32
        return self._block_bytes

    def describe(self, spec: KvSpec, dtype: torch.dtype) -> tuple[CacheTensor, ...]:
        return ()

    def write(self, *_: Any) -> None: ...

    def gather(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(0), torch.empty(0)


class Seven(Loader):
    def __init__(self, events: list[str]) -> None:
        self._events = events

    def load(self, model: Model) -> None:
        self._events.append("load")
        model.load_random(7)


class Broken(Loader):
    def __init__(self) -> None: ...

    def load(self, model: Model) -> None:
        raise CheckpointError("no such file")


class Runner(ModelRunner):
    def __init__(self, events: list[str]) -> None:
        self._events = events

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        assert groups == GROUPS
        self._events.append(f"allocate {num_blocks}")

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        self._events.append("compile")

    def warm_up(self) -> None:
        self._events.append("warm_up")

    def execute(self, step: StepInput) -> StepResult:
        self._events.append("execute")
        return StepResult(step.plan.step, [])


class Prepared(ModelProgram):
    def __init__(self, events: list[str]) -> None:
        self._events = events

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        assert groups == GROUPS
        self._events.append("prepare")

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        raise AssertionError("the runner allocates")

    @property
    def caches(self) -> Sequence[LayerCache]:
        return []

    def run(self, plan: BatchPlan) -> torch.Tensor:
        raise AssertionError("the runner runs the program")


class Hnd(PlanAttention):
    layouts = ("hnd", "nhd")


def worker(
    events: list[str] | None = None,
    *,
    free: int | None = FREE,
    max_model_len: int = 64,
    attention: PlanAttention | None = None,
    layout: KvLayout | None = None,
    loader: Loader | None = None,
    null_block: bool = False,
    num_blocks: int | None = None,
    kv_cache_memory: str | int | None = None,
    memory_fraction: float = 0.5,
    max_num_seqs: int = 3,
) -> StandardWorker:
    events = [] if events is None else events
    return StandardWorker(
        device=SmallDevice(events, free),
        loader=loader or Seven(events),
        model=CountingModel(vocab_size=50, max_model_len=max_model_len),
        kv_layout=layout or Pages(),
        attention=attention or PlanAttention(),
        limits=StandardLimits(
            mixed_steps=True,
            chunked_prefill=True,
            max_prefill_rows=None,
            max_batch_context=None,
            null_block=null_block,
            drafts=True,
        ),
        ops=SelectedOps(TorchOps()),
        program=Prepared(events),
        model_runner=Runner(events),
        placement=Placement(rank=1, world_size=2),
        config=CacheBounds(
            num_blocks=num_blocks,
            kv_cache_memory=kv_cache_memory,
            memory_fraction=memory_fraction,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=64,
        ),
    )


def sized(**given: Any) -> CacheSize:
    one = worker(**given)
    one.load()
    return one.prepare(GROUPS)


def test_the_order_of_a_worker_s_life() -> None:
    events: list[str] = []
    one = worker(events, num_blocks=9)
    one.load()
    assert events == ["load", "synchronize", "memory"]
    size = one.prepare(GROUPS)
    # the cache is sized once the weights are in and the program is compiled
    assert events[3:] == ["memory", "prepare", "compile", "synchronize", "memory"]
    one.allocate(size.num_blocks)
    assert one.execute(StepInput(StepPlan(4, [], [], []))).step == 4
    assert events[8:] == ["memory", "allocate 9", "memory", "warm_up", "memory", "execute"]


def test_a_warm_up_that_eats_what_the_cache_was_promised_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A host's memory is taken when the cache is first used, and would be missed then."""
    one = worker(num_blocks=900)
    monkeypatch.setattr(SmallDevice, "on_host", True)
    one.load()
    size = one.prepare(GROUPS)
    monkeypatch.setattr(one._runner, "warm_up", lambda: setattr(one._device, "_free", 800_000))
    with pytest.raises(ConfigError, match=r"the warm-up left .* 900 blocks .* worker\.num_blocks"):
        one.allocate(size.num_blocks)


def test_it_says_what_compiling_and_warming_up_took(monkeypatch: pytest.MonkeyPatch) -> None:
    one = worker(num_blocks=9)
    one.load()

    def takes(method: str, size: int) -> None:
        def take(*_: Any) -> None:
            one._device._free -= size  # type: ignore[attr-defined]

        monkeypatch.setattr(one._runner, method, take)

    takes("prepare", 5000)
    takes("allocate", 9 * BLOCK_BYTES)
    takes("warm_up", 300)
    monkeypatch.setattr(Prepared, "num_compiles", 4)
    one.prepare(GROUPS)
    told = one.allocate(9)
    assert (told.num_programs, told.program_bytes) == (4, 5300)  # the cache is not among it
    assert told.seconds >= 0
    takes("prepare", -7000)  # weights that the program has, too, were given back
    one.prepare(GROUPS)
    assert one.allocate(9).program_bytes == 0


def test_a_device_without_a_memory_report_tells_the_time_alone() -> None:
    one = worker(free=None, num_blocks=9)
    one.load()
    one.prepare(GROUPS)
    assert one.allocate(9).program_bytes is None


def test_the_report_says_what_only_the_device_knows() -> None:
    report = worker(num_blocks=9, max_model_len=100).load()
    assert (report.num_blocks, report.block_size, report.bytes_per_block) == (0, BLOCK, 0)
    assert (report.max_model_len, report.vocab_size, report.eos_token_ids) == (100, 50, [0])
    assert (report.device, report.dtype) == ("cpu", "float32")
    assert report.kv_specs == [KvSpec(layer=0, num_kv_heads=1, head_size=1)]
    details = report.details
    assert details["rank"] == 1 and details["load_seconds"] >= 0
    assert (details["memory_free"], details["memory_total"]) == (FREE, 2 * FREE)
    assert details["ops"]["linear"] == "torch"


@pytest.mark.parametrize(
    ("given", "blocks"),
    [
        ({"num_blocks": 25}, 25),
        ({"kv_cache_memory": 11 * BLOCK_BYTES + 999}, 11),
        ({"kv_cache_memory": "8KB"}, 8),
        ({"memory_fraction": 0.01}, 10),
        ({"memory_fraction": 1.0}, 12),  # three sequences of four blocks: more is never used
        ({"memory_fraction": 1.0, "null_block": True}, 13),
        ({"kv_cache_memory": "900KB", "max_num_seqs": 100}, 400),
        ({"layout": Pages(0)}, 12),  # a model that keeps no cache
    ],
)
def test_the_cache_is_sized_from_config_or_free_memory(given: dict[str, Any], blocks: int) -> None:
    assert sized(**given).num_blocks == blocks


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"num_blocks": 3}, "raise worker.num_blocks,"),
        ({"num_blocks": 4, "null_block": True}, "needs 5"),
        ({"kv_cache_memory": "3999B"}, "raise worker.kv_cache_memory,"),
        ({"free": 7999}, "raise worker.memory_fraction"),
        ({"free": 0}, r"room for 0 blocks .*0\.5 of 0 B free"),
    ],
)
def test_one_whole_sequence_must_fit(given: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        sized(**given)
    assert "64 tokens" in str(caught.value) and "model.max_model_len" in str(caught.value)
    assert "3.91 KiB" in str(caught.value) or given.get("null_block")


@pytest.mark.parametrize("given", [{"num_blocks": 1001}, {"kv_cache_memory": "2MB"}])
def test_more_than_is_free_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"976.56 KiB are free"):
        sized(**given, max_num_seqs=1000)


def test_two_sizes_of_one_cache_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"num_blocks \(4\) and kv_cache_memory \(1GiB\)"):
        worker(num_blocks=4, kv_cache_memory="1GiB")


def test_an_attention_that_cannot_read_the_layout_is_refused_before_the_weights() -> None:
    events: list[str] = []
    with pytest.raises(ConfigError, match=r"Hnd cannot read the KV layout 'pages'.*hnd, nhd"):
        worker(events, attention=Hnd())
    assert events == []


def test_a_wrong_size_is_named() -> None:
    with pytest.raises(ConfigError, match="kv_cache_memory: 'plenty'"):
        worker(kv_cache_memory="plenty")


def test_a_device_without_a_memory_report_needs_a_size() -> None:
    events: list[str] = []
    with pytest.raises(
        ConfigError, match=r"^must be set .*SmallDevice has no memory report"
    ) as caught:
        worker(events, free=None).load()
    assert caught.value.key == "worker.num_blocks"
    assert "load" not in events  # said before the weights are read
    assert sized(free=None, num_blocks=9).num_blocks == 9
    assert sized(free=None, kv_cache_memory=9 * BLOCK_BYTES).num_blocks == 9
    assert "memory_free" not in worker(free=None, num_blocks=9).load().details


def test_a_loader_s_error_is_the_worker_s() -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        worker(loader=Broken()).load()
