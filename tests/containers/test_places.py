"""What a worker raises while it loads, compiles and allocates names the key at fault and where it
was set, in every executor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.containers.two_platforms import TWO, config_dir
from torch import Tensor

from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.interfaces import AttentionSpec, Communicator, Placement
from vllm_di.components.transport import Failure
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import Launcher, open_engine, opened
from vllm_di.containers.schema import check
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import CheckpointError, ConfigError, PortError, VllmDiError

TINY = ("model=tiny", "model.dtype=float32", "device.threads=1")
CPU = ("platform=cpu", *TINY)
PROCESS = ("executor=multiprocess",)
RANKS = (*PROCESS, "executor.tensor_parallel_size=2")
YAML = r"conf/worker/standard\.yaml:"

LOAD = (
    ("trust=[tests]", "quantization=int4", "model.hidden_size=80", "model.head_dim=20"),
    r"conf/quantization/int4\.yaml:2: quantization: by groups of 32: ",
)
PREPARE = (
    ("worker.num_blocks=1",),
    r"command line: worker\.num_blocks=1: worker\.num_blocks: the KV cache has room for 1 block ",
)
OF_FILE = (
    ("device.memory_budget=1MiB",),
    YAML + r"\d+: worker\.memory_fraction: the KV cache has room for \d+ blocks",
)


@pytest.mark.parametrize("executor", [(), PROCESS, RANKS], ids=["inline", "process", "ranks"])
@pytest.mark.parametrize("case", [LOAD, PREPARE, OF_FILE], ids=["load", "prepare", "file"])
def test_key_and_place_come_first(case: tuple[tuple[str, ...], str], executor: tuple[str]) -> None:
    overrides, message = case
    assembly = assemble([*CPU, *executor, *overrides])
    with pytest.raises(ConfigError) as caught, open_engine(assembly):
        pass
    assert re.match(rf"(\S*/)?{message}", str(caught.value)), caught.value


@pytest.mark.parametrize("processes", ["false", "true"], ids=["threads", "processes"])
def test_a_stage_is_named_by_its_own_key(tmp_path: Path, processes: str) -> None:
    folder = config_dir(tmp_path, TWO)
    stages = ("stages.0.worker.num_blocks=512", "stages.1.worker.num_blocks=1")
    overrides = ["platform=two", "model=tiny", *stages, f"executor.processes={processes}"]
    with pytest.raises(ConfigError) as caught, open_engine(assemble(overrides, [folder])):
        pass
    told = "command line: stages.1.worker.num_blocks=1: stages.1.worker.num_blocks: the KV cache"
    assert str(caught.value).startswith(told)


def test_a_slot_is_placed_by_its_class() -> None:
    launcher = Launcher(assemble([*CPU, "graph=eager"]))
    with pytest.raises(PortError) as caught, launcher.placed(0):
        raise PortError("no", key="graph")
    assert str(caught.value).endswith("conf/graph/eager.yaml:2: graph: no")
    with pytest.raises(ConfigError, match=r"^as it is$"), launcher.placed(0):
        raise ConfigError("as it is")


@pytest.mark.parametrize(
    "error", [ConfigError("a", key="b.c"), PortError("a"), CheckpointError("a")], ids=repr
)
def test_a_key_crosses_processes(error: VllmDiError) -> None:
    there = Failure.of(error).error()
    assert (type(there), str(there)) == (type(error), str(error))
    assert getattr(there, "key", None) == getattr(error, "key", None)


@pytest.mark.parametrize("text", ["foo: 1\n", "", "_target_: null\n"])
@pytest.mark.parametrize("slot", ["attention", "metrics", "scheduler"])
def test_an_option_without_a_class(slot: str, text: str, tmp_path: Path) -> None:
    """The option's own file is named, not what interpolates its class."""
    (tmp_path / slot).mkdir()
    (tmp_path / slot / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"mine\.yaml: {slot}: it must be a mapping with a _t"):
        assemble([f"{slot}=mine", "platform=cpu", "model=tiny"], [tmp_path])


TYPED = {
    "model.max_model_len=100000": (),
    "model.dtype=float33": (),
    "kv_layout.dtype=int3": (),
    "kv_layout=nhd": (),
    "kv_layout=spyre": ("attention=hybrid",),
    "worker.kv_cache_memory=lots": (),
    "worker.num_blocks=300": ("worker.kv_cache_memory=1GiB",),
    "device.memory_budget=lots": (),
    "scheduler.max_num_batched_tokens=1": (),
    "shapes=grid": (),
    "model.hidden_size=63": ("model.head_dim=null",),
    "ops.library.isa=amx_emulatd": ("ops=cpu",),
}


@pytest.mark.parametrize("override", TYPED)
def test_what_a_person_typed_is_the_place(override: str) -> None:
    """Of a value that a constructor refuses, in whichever slot."""
    assembly = assemble([*CPU, *TYPED[override], override])
    with pytest.raises(ConfigError) as caught, open_engine(assembly):
        pass
    assert str(caught.value).startswith(f"command line: {override}: "), caught.value


class Three(Communicator):
    rank, world_size = 0, 3

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return x


def test_a_model_that_cannot_be_split_is_the_fault_of_the_size() -> None:
    typed = "executor.tensor_parallel_size=3"
    assembly = assemble([*CPU, *PROCESS, typed])
    parts: dict[str, Any] = {"placement": Placement(world_size=3), "communicator": Three()}
    with pytest.raises(ConfigError) as caught, opened(WorkerContainer, assembly, **parts):
        pass
    place = f"command line: {typed}: executor.tensor_parallel_size"
    assert str(caught.value).startswith(f"{place}: num_attention_heads (4) cannot be split")


def test_a_key_of_a_file_is_placed_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "worker").mkdir()
    text = "# Mine.\ndefaults:\n  - standard\n\nkv_cache_memory: lots\n"
    (tmp_path / "worker/mine.yaml").write_text(text)
    with (
        pytest.raises(ConfigError) as caught,
        open_engine(assemble([*CPU, "worker=mine"], [tmp_path])),
    ):
        pass
    assert str(caught.value).startswith(f"{tmp_path}/worker/mine.yaml:5: worker: kv_cache_memory")


class Refusing(SdpaAttention):
    def check(self, spec: AttentionSpec) -> None:
        raise ConfigError("no such window")


def test_a_layer_that_attention_refuses_is_the_fault_of_attention() -> None:
    target = f"attention._target_={__name__}.Refusing"
    assembly = assemble([*CPU, "attention=sdpa", "trust=[tests]", target])
    with pytest.raises(ConfigError) as caught, open_engine(assembly):
        pass
    assert str(caught.value) == f"command line: {target}: attention: no such window"


def test_where_a_node_of_keys_is_expected() -> None:
    cuda = ["platform=cuda", "model=tiny", "device.simulated=true"]
    words = "expected a node of keys with the _target_ of a component .Simulation., or null, got 3"
    with pytest.raises(ConfigError, match=f"^command line: device.simulation=3: .*{words}"):
        check(WorkerContainer, assemble([*cuda, "device.simulation=3"]))


def test_a_word_that_is_none_of_a_few() -> None:
    assembly = assemble(["ops.library.isa=avx3", "platform=cpu", "model=tiny"])
    with pytest.raises(ConfigError, match=r"avx3.*choose of auto, .*did you mean 'avx2'"):
        check(WorkerContainer, assembly)
