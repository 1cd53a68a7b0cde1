"""TorchDevice against a stand-in for ``torch.<backend>``: no accelerator is needed."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from vllm_di.components.device.torch_device import TorchDevice
from vllm_di.components.interfaces import Placement
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError, PortError

GIB = 2**30


class Accelerator(types.ModuleType):
    """What TorchDevice needs of a module: two devices of 16 GiB, 10 of them free, 1 cached."""

    def __init__(self, capability: tuple[int, int] = (8, 0)) -> None:
        super().__init__("torch.hpu")
        self.capability, self.present = capability, True
        self.allocated, self.calls = 2 * GIB, list[Any]()

    def is_available(self) -> bool:
        return self.present

    def init(self) -> None:
        raise RuntimeError("Found no driver.\nLook elsewhere.")

    def device_count(self) -> int:
        return 2

    def set_device(self, index: int) -> None:
        self.calls.append(("set_device", index))

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 10 * GIB, 16 * GIB

    def memory_allocated(self, index: int) -> int:
        return self.allocated

    def memory_reserved(self, index: int) -> int:
        return self.allocated + GIB

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        self.calls.append(("fraction", fraction, index))

    def manual_seed_all(self, seed: int) -> None:
        self.calls.append(("seed", seed))

    def synchronize(self, index: int) -> None:
        self.calls.append(("synchronize", index))

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return self.capability

    def get_device_name(self, index: int) -> str:
        return "Acme One"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    stand_in = Accelerator()
    monkeypatch.setattr(torch, "hpu", stand_in, raising=False)
    return stand_in


def device(placement: Placement | None = None, **changes: Any) -> TorchDevice:
    values: dict[str, Any] = {
        "backend": "hpu",
        "package": None,
        "runtime": None,
        "install": "install the Acme driver",
        "index": None,
        "memory_budget": None,
        "dtypes": ["bfloat16", "float16", "float32"],
        "dtype_capability": {"bfloat16": 8.0},
        "default_dtype": "auto",
    }
    return TorchDevice(placement, **values | changes)


def test_a_rank_takes_its_own_device(module: Accelerator) -> None:
    assert device().torch_device == torch.device("hpu", 0)
    assert device(Placement(rank=1, world_size=2)).torch_device == torch.device("hpu", 1)
    assert module.calls[-1] == ("set_device", 1)
    assert device(index=1).torch_device == torch.device("hpu", 1)
    second = Placement(replica=1, num_replicas=2)
    assert device(second).torch_device == torch.device("hpu", 1)
    with pytest.raises(ConfigError, match=r"index: 0 for executor\.data_parallel_size=2"):
        device(second, index=0)
    beyond = Placement(rank=1, world_size=2, replica=1, num_replicas=2)
    with pytest.raises(ConfigError, match=r"rank 1 of replica 1 .*: there is no hpu:3"):
        device(beyond)
    with pytest.raises(ConfigError, match=r"rank 2: there is no hpu:2; this machine has 2"):
        device(Placement(rank=2, world_size=4))
    with pytest.raises(ConfigError, match=r"index: there is no hpu:7"):
        device(index=7)


def test_memory_counts_what_torch_only_caches_as_free(module: Accelerator) -> None:
    memory = device().memory()
    assert (memory.free, memory.total) == (11 * GIB, 16 * GIB)


def test_a_budget_bounds_the_memory(module: Accelerator) -> None:
    limited = device(memory_budget="4GiB")
    assert ("fraction", 0.25, 0) in module.calls
    limited.close()  # the process's, and the next device here has its own
    assert module.calls[-1] == ("fraction", 1.0, 0)
    assert (limited.memory().free, limited.memory().total) == (2 * GIB, 4 * GIB)
    module.allocated = 5 * GIB
    assert limited.memory().free == 0
    module.allocated = 0
    assert device(memory_budget="15GiB").memory().free == 11 * GIB  # no more than there is
    with pytest.raises(ConfigError, match=r"memory_budget: .* Acme One has"):
        device(memory_budget="17GiB")


def test_bfloat16_needs_the_capability(module: Accelerator) -> None:
    assert device().default_dtype == torch.bfloat16
    module.capability = (7, 5)
    old = device()
    assert old.supported_dtypes == (torch.float16, torch.float32)
    assert old.dtype("auto") == torch.float16
    with pytest.raises(ConfigError, match=r"bfloat16.*needs compute capability 8.*has 7\.5.*float"):
        old.dtype("bfloat16")
    with pytest.raises(ConfigError, match=r"bfloat16.*needs compute capability"):
        device(default_dtype="bfloat16")
    module.capability = (12, 0)
    assert device().default_dtype == torch.bfloat16


def test_dtypes_come_from_the_config(module: Accelerator) -> None:
    assert device(default_dtype="float32").dtype("auto") == torch.float32
    with pytest.raises(ConfigError, match=r"'bfloat61' is no dtype.*did you mean 'bfloat16'"):
        device(dtypes=["bfloat61"])
    with pytest.raises(ConfigError, match="float32"):
        device(dtypes=["bfloat16"]).dtype("float32")
    with pytest.raises(ConfigError, match="dtypes"):
        device(dtypes=[])


def test_synchronize_and_close_reach_the_module(module: Accelerator) -> None:
    one = device(Placement(rank=1, world_size=2))
    one.synchronize()
    one.close()
    assert module.calls[-2:] == [("synchronize", 1), "empty_cache"]


def test_an_absent_driver_is_named_with_its_reason_and_the_cure(module: Accelerator) -> None:
    module.present = False
    with pytest.raises(PortError, match=r"hpu: .*Found no driver\.; install the Acme driver"):
        device()


def test_an_absent_package_is_named() -> None:
    with pytest.raises(PortError, match=r"acme_torch is not installed; install the Acme"):
        device(package="acme_torch")


def test_a_package_that_breaks_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, module: Accelerator
) -> None:
    (tmp_path / "broken_acme.py").write_text("import libacme_of_old")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PortError, match=r"broken_acme cannot be imported: .*libacme_of_old"):
        device(package="broken_acme")


def test_a_torch_without_the_module_or_the_runtime_is_refused(module: Accelerator) -> None:
    with pytest.raises(PortError, match=r"has no module torch\.nowhere"):
        device(backend="nowhere")
    with pytest.raises(PortError, match=r"was built without acme_runtime"):
        device(runtime="acme_runtime")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("cuda", ["device/cuda.yaml", "built without cuda", "NVIDIA's driver"]),
        ("rocm", ["device/rocm.yaml", "built without hip", "AMD's driver"]),
        ("xpu", ["device/xpu.yaml", "built without xpu", "Intel's driver"]),
    ],
)
def test_each_option_says_what_is_absent(
    option: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for runtime in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, runtime, None, raising=False)
    with (
        pytest.raises(PortError) as caught,
        opened(
            WorkerContainer,
            assemble(["platform=cpu", f"device={option}", "model=tiny"]),
            placement=Placement(),
            only=["device"],
        ),
    ):
        pass
    assert all(word in str(caught.value) for word in words), str(caught.value)
