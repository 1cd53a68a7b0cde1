from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vllm_di.components.device import system
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import Placement
from vllm_di.errors import ConfigError

GIB = 2**30


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def host(
    placement: Placement | None = None,
    *,
    threads: int | None = 1,
    budget: str | int | None = None,
    dtype: str = "auto",
) -> HostDevice:
    return HostDevice(placement, threads=threads, memory_budget=budget, default_dtype=dtype)


def test_threads_are_set_and_restored() -> None:
    torch.set_num_threads(2)
    device = host(threads=1)
    assert torch.get_num_threads() == 1
    device.close()
    assert torch.get_num_threads() == 2


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "usable_cores", lambda: 7)
    for ranks, threads in ((1, 7), (2, 3), (16, 1)):
        device = host(Placement(rank=0, world_size=ranks), threads=None)
        assert torch.get_num_threads() == threads
        device.close()


def test_cores_are_shared_out_and_given_back() -> None:
    allowed = system.allowed_cores()
    for rank in range(len(allowed)):
        device = HostDevice(
            Placement(rank=rank, world_size=len(allowed)),
            threads=None,
            memory_budget=None,
            default_dtype="auto",
            cores=allowed,
        )
        assert system.allowed_cores() == [allowed[rank]]
        assert torch.get_num_threads() == 1
        with ThreadPoolExecutor() as pool:
            assert pool.submit(system.allowed_cores).result() == [allowed[rank]]
        device.close()
        assert system.allowed_cores() == allowed


def test_replicas_share_the_cores_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "usable_cores", lambda: 7)
    placement = Placement(rank=1, world_size=2, replica=1, num_replicas=2)
    assert (placement.host_rank, placement.host_world_size) == (3, 4)
    device = host(placement, threads=None)
    assert torch.get_num_threads() == 1
    device.close()
    crowd = Placement(replica=3, num_replicas=8)
    with pytest.raises(ConfigError, match="data_parallel_size=8: 8 workers in all, and 7 cores"):
        host(crowd, threads=None)
    host(crowd, threads=1).close()
    pinned: list[list[int]] = []
    monkeypatch.setattr(system, "allowed_cores", lambda: [4, 5, 6, 7])

    def pin(cores: list[int]) -> list[int]:
        pinned.append(cores)
        return [4, 5, 6, 7]

    monkeypatch.setattr(system, "pin", pin)
    HostDevice(
        Placement(replica=1, num_replicas=2),
        threads=None,
        memory_budget=None,
        default_dtype="auto",
        cores=[4, 5, 6, 7],
    ).close()
    assert pinned == [[6, 7], [4, 5, 6, 7]]


def test_cores_that_cannot_be_had_are_refused() -> None:
    allowed = system.allowed_cores()

    def device(cores: list[int], ranks: int = 1) -> HostDevice:
        return HostDevice(
            Placement(rank=0, world_size=ranks),
            threads=None,
            memory_budget=None,
            default_dtype="auto",
            cores=cores,
        )

    with pytest.raises(ConfigError, match=f"cores: {allowed[-1] + 1} is not among those .*use: "):
        device([allowed[-1] + 1])
    with pytest.raises(ConfigError, match="cores: 1 for 2 ranks"):
        device(allowed[:1], ranks=2)
    with pytest.raises(ConfigError, match="cores: 0 for 1 ranks"):
        device([])
    assert system.allowed_cores() == allowed


def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, dtype in (
        ({"avx512_bf16", "avx2"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
        ({"avx512f", "avx2"}, torch.float32),
        (set(), torch.float32),
    ):
        monkeypatch.setattr(system, "cpu_flags", lambda flags=flags: flags)
        assert host().default_dtype == dtype
        assert host().dtype("auto") == dtype


def test_a_dtype_is_honoured_or_refused() -> None:
    assert host(dtype="float16").dtype("auto") == torch.float16
    assert host().dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ConfigError, match=r"float64.*HostDevice does not support it"):
        host(dtype="float64")
    with pytest.raises(ConfigError, match=r"no such dtype.*did you mean 'bfloat16'"):
        host().dtype("bfloat61")


def test_a_declared_budget_shrinks_as_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    held = 3 * GIB
    monkeypatch.setattr(system, "resident_bytes", lambda: held)
    device = host(budget="8GiB")
    assert (device.memory().free, device.memory().total) == (8 * GIB, 8 * GIB)
    held = 5 * GIB
    assert device.memory().free == 6 * GIB
    held = 50 * GIB
    assert device.memory().free == 0


def test_ranks_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "memory", lambda: (6 * GIB, 8 * GIB))
    pair = Placement(rank=1, world_size=2)
    assert (host(pair).memory().free, host(pair).memory().total) == (3 * GIB, 4 * GIB)
    assert host(pair, budget=2 * GIB).memory().total == GIB
    assert host().memory().free == 6 * GIB


def test_a_wrong_budget_names_the_key() -> None:
    with pytest.raises(ConfigError, match="memory_budget: 'much'"):
        host(budget="much")


def test_zeros_are_zero_in_any_dtype() -> None:
    for dtype in HostDevice.supported_dtypes:
        zeros = host().zeros((3, 2, 5), dtype)
        assert zeros.shape == (3, 2, 5) and zeros.dtype == dtype and not zeros.any()
        zeros += 1  # it is writable memory of its own
        assert bool((zeros == 1).all())
