"""platform=cuda, rocm and xpu as config: what fills the slots, and what is said without a
GPU."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch

from vllm_di.components.attention.triton import TritonAttention
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import AttentionSpec, Placement
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.ops.triton import TritonOps
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError, PortError

PLATFORMS = ["cuda", "rocm", "xpu"]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch without any GPU runtime, whatever this machine has."""
    for runtime in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, runtime, None, raising=False)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_explain_needs_no_gpu(platform: str) -> None:
    explanation = explain(assemble([f"platform={platform}", "model=tiny"]))
    assert (explanation.platform, explanation.claimed_level) == (platform, None)
    classes = {row.slot: row.target.split(".")[-1] for row in explanation.rows}
    assert classes["device"] == "TorchDevice"
    assert classes["attention"] == "TritonAttention"
    assert classes["graph"] == "AcceleratorGraph"
    assert classes["shapes"] == "CaptureSizes"
    runs = {row.op: row.runs_on for row in explanation.ops}
    assert runs["paged_attention"].startswith("triton (")
    assert runs["linear"] == "the vendor's library of products, through torch"
    assert explanation.fusions == ["add_rms_norm", "rotary_write_kv"]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_start_without_a_gpu_names_what_is_missing(platform: str) -> None:
    with (
        pytest.raises(PortError) as caught,
        opened(
            WorkerContainer, assemble([f"platform={platform}", "model=tiny"]), placement=Placement()
        ),
    ):
        pass
    words = ["device.yaml", "device", "was built without", "driver", "install"]
    assert all(
        word in str(caught.value).replace(f"{platform}.yaml", "device.yaml") for word in words
    )


def test_the_manifest_names_the_ops_of_the_library() -> None:
    for platform in PLATFORMS:
        settings = assemble([f"platform={platform}", "model=tiny"]).settings
        assert set(settings["platform"]["capabilities"]["ops"]) == TritonOps.implements


def test_each_op_can_come_from_elsewhere() -> None:
    for op in sorted(TritonOps.implements):
        choices = ["platform=cuda", "model=tiny", "attention=paged", f"ops.{op}=torch"]
        runs = {row.op: row.runs_on for row in explain(assemble(choices)).ops}
        assert runs[op] == "torch", op
        others = TritonOps.implements - {op, "linear", "add_rms_norm", "rotary_write_kv"}
        assert all(runs[other].startswith("triton") for other in others)
        unfused = runs["add_rms_norm"].startswith("unfused")
        assert unfused == (op == "rms_norm") or op == "add_rms_norm"


def test_without_triton_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return real(name, *args, **kwargs)

    for module in [m for m in sys.modules if m.startswith("vllm_di.kernels.triton.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(PortError, match=r"package triton is not installed; pip install"):
        TritonOps(programs=None, num_stages=2)


def layout() -> HndLayout:
    device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
    return HndLayout(device, block_size=32, dtype="auto")


def test_attention_triton_is_triton_or_an_error() -> None:
    table = SelectedOps(TritonOps(programs=1, num_stages=2))
    attention = TritonAttention(table, layout())
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_size=256, scale=1.0)
    attention.check(spec)
    with pytest.raises(ConfigError, match=r"head sizes up to 256, not 512; choose attention=sdpa"):
        attention.check(AttentionSpec(num_heads=8, num_kv_heads=2, head_size=512, scale=1.0))
    mixed = SelectedOps(TritonOps(programs=1, num_stages=2), paged_attention=TorchOps())
    with pytest.raises(ConfigError, match=r"ops\.paged_attention is TorchOps's; .*attention=paged"):
        TritonAttention(mixed, layout())


def test_weights_on_the_host_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the weights are on the host; .*ops=cpu"):
        TritonOps(programs=1, num_stages=2).pack_linear(torch.zeros(2, 2))


def test_contexts_are_cut_until_the_device_is_full() -> None:
    ops = TritonOps(programs=528, num_stages=2)
    # (programs there are, tokens of context) -> parts
    assert ops._splits(8, 8192) == 64
    assert ops._splits(8, 1024) == 8  # no part shorter than 128 keys
    assert ops._splits(512, 8192) == 2
    assert ops._splits(1000, 8192) == 1
    assert ops._splits(8, 32) == 1
