"""What the simulated device keeps of a real one. Run in a process of their own."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from vllm_di.components.communicator.torch_distributed import TorchDistributedCommunicator
from vllm_di.components.device.simulated import HostSimulation
from vllm_di.components.device.torch_device import TorchDevice
from vllm_di.components.interfaces import Placement
from vllm_di.components.transport import GroupStore
from vllm_di.errors import ConfigError
from vllm_di.kernels.simulated.module import Fault, SimulatedModule

MIB = 1 << 20


def device(
    memory: int = 64 * MIB,
    placement: Placement | None = None,
    name: str = "chip",
    fault: Fault | None = None,
    fault_after: int = 0,
) -> TorchDevice:
    return TorchDevice(
        placement or Placement(),
        backend=name,
        package="no_such_package",
        runtime=None,
        install="install nothing",
        index=None,
        memory_budget=None,
        dtypes=["bfloat16", "float32"],
        dtype_capability={},
        default_dtype="auto",
        simulated=True,
        simulation=HostSimulation(
            memory=memory,
            devices=4,
            communication="chipccl",
            fault=fault,
            fault_after=fault_after,
        ),
    )


def module() -> SimulatedModule:
    found: SimulatedModule = torch.chip  # type: ignore[attr-defined]
    return found


def refused(run: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        run()


def check_tensors_are_the_devices_own() -> None:
    d = device()
    x = torch.arange(6, dtype=torch.float32, device=d.torch_device)
    assert x.device == torch.device("chip", 0) and type(x) is Tensor
    assert x.cpu().device.type == "cpu" and x.cpu().tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.nn.Linear(2, 2).to("chip").weight.device.type == "chip"


def check_ops_equal_the_hosts() -> None:
    device()
    generator = torch.Generator().manual_seed(0)
    host = torch.randn(4, 6, generator=generator)
    ours = host.to("chip")
    for op in (
        lambda x: x.t() @ x,
        lambda x: x.softmax(-1).cumsum(0),
        lambda x: x.sort(descending=True)[1],
        lambda x: torch.cat([x, x]).chunk(2)[1],
        lambda x: x[x > 0],
        lambda x: x.transpose(0, 1).reshape(2, -1)[:, ::3],
        lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]),
        lambda x: x.bfloat16().float().topk(2)[0],
    ):
        with torch.inference_mode():
            assert torch.equal(op(ours).cpu(), op(host))


def check_views_share_memory() -> None:
    device()
    with torch.inference_mode(False):
        x = torch.zeros(2, 3, device="chip")
    with torch.inference_mode():
        x.t()[1].add_(2)
        x.view(-1)[:1] = 7
        torch.split(x, [1, 2], 1)[0][1] = 5
        out = torch.empty(0, device="chip")
        torch.add(x, x, out=out)
    assert x.tolist() == [[7, 2, 0], [5, 2, 0]]
    assert out.tolist() == [[14, 4, 0], [10, 4, 0]]


def check_memory_is_nan_until_written() -> None:
    device()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.empty(5, dtype=dtype, device="chip").isnan().all()
        assert torch.zeros(5, dtype=dtype, device="chip").eq(0).all()


def check_host_and_device_do_not_mix() -> None:
    device()
    ours, host = torch.ones(2, device="chip"), torch.ones(2)
    refused(lambda: ours + host, RuntimeError, "Expected all tensors to be on the same device")
    refused(lambda: torch.cat([ours, host]), RuntimeError, "found at least two devices")
    other = torch.ones(2, device="chip:1")
    refused(lambda: ours * other, RuntimeError, "chip:0 and chip:1")
    assert (ours + torch.tensor(1.0)).tolist() == [2, 2]  # a number may come from the host


def check_memory_is_counted_and_ends() -> None:
    d = device(memory=64 * MIB)
    base = d.memory()
    assert base.total == 64 * MIB
    x = torch.zeros(32 * MIB, dtype=torch.uint8, device="chip")
    y = x + 1  # a result counts as well
    assert base.free - d.memory().free == 64 * MIB
    refused(
        lambda: torch.empty(MIB, device="chip"), torch.OutOfMemoryError, "simulated device is out"
    )
    refused(lambda: x + 2, torch.OutOfMemoryError, "33554432 bytes asked for")
    view = y[:1]
    del y
    x.resize_(0)
    x.untyped_storage().resize_(0)
    assert base.free - d.memory().free == 32 * MIB  # a view keeps the whole
    assert view.tolist() == [1]
    del view
    assert d.memory() == base and module().max_memory_allocated() >= 64 * MIB


def check_a_budget_is_kept() -> None:
    d = device(memory=64 * MIB)
    module().set_per_process_memory_fraction(0.25)
    refused(lambda: torch.zeros(5 * MIB, device="chip"), torch.OutOfMemoryError, "20971520 bytes")
    d.close()


def check_injected_faults() -> None:
    device()
    x = torch.ones(3, device="chip")
    module().inject("out_of_memory")
    refused(lambda: torch.empty(1, device="chip"), torch.OutOfMemoryError, "injected")
    assert torch.empty(1, device="chip").numel() == 1  # it strikes once
    module().inject("nan", after=10)
    struck = [bool((x + 1).isnan().all()) for _ in range(20)]
    assert sum(struck) == 1 and not struck[0]
    module().inject("death")
    for _ in range(2):
        refused(lambda: x + 1, RuntimeError, "the simulated device is lost")
    refused(module().synchronize, RuntimeError, "the simulated device is lost")
    module().clear_fault()
    assert (x + 1).tolist() == [2, 2, 2]


def check_a_hang_lasts_until_it_is_cleared() -> None:
    device()
    x = torch.ones(1, device="chip")
    module().inject("hang")
    worker = threading.Thread(target=lambda: x.add_(1))
    worker.start()
    worker.join(0.2)
    assert worker.is_alive()
    module().clear_fault()
    worker.join(5)
    assert not worker.is_alive() and x.tolist() == [2]


def check_faults_come_from_config() -> None:
    device(fault="out_of_memory", fault_after=10)
    torch.empty(1, device="chip")
    refused(
        lambda: [torch.empty(1, device="chip") for _ in range(20)],
        torch.OutOfMemoryError,
        "injected",
    )
    device(fault="death")
    refused(lambda: torch.ones(2, device="chip"), RuntimeError, "the simulated device is lost")
    device()  # opening it again disarms
    x = torch.ones(2, device="chip")
    assert (x + 1).tolist() == [2, 2]


def check_one_name_in_a_process() -> None:
    device()
    refused(lambda: device(name="other"), ConfigError, "this process simulates 'chip' already")


def check_the_module_answers() -> None:
    d = device()
    assert module().device_count() == 4 and module().get_device_name() == "simulated chip"
    refused(lambda: torch.empty(1, device="chip:4"), RuntimeError, "no index 4")
    assert d.host_zeros((3,), torch.float32).tolist() == [0, 0, 0]
    d.mark()()
    d.synchronize()


def _rank(rank: int, rendezvous: str) -> None:
    placement = Placement(rank=rank, world_size=2, rendezvous=rendezvous)
    d = device(placement=placement)
    comm = TorchDistributedCommunicator(placement, d, backend="chipccl", timeout=30)
    x = torch.arange(4, dtype=torch.float32, device=d.torch_device) + 10 * rank
    assert comm.all_reduce(x.clone()).tolist() == [10, 12, 14, 16]
    assert comm.all_gather(x[None], 0).tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert comm.all_reduce(x.bfloat16()).dtype is torch.bfloat16
    comm.close()


def check_two_ranks_speak_through_its_group() -> None:
    store = GroupStore()
    spawn(_rank, (store.address,), nprocs=2)
    store.close()
