"""Collectives over shared memory, beside gloo and beside sums done here."""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from tests.components.communicator.ranks import (
    dies,
    free_address,
    join,
    meet,
    on_processes,
    on_threads,
    same_as_gloo,
    values,
)
from torch import Tensor

from vllm_di import LLM, SamplingParams
from vllm_di.components.communicator.shared_memory import SharedMemoryCommunicator as Rank
from vllm_di.components.interfaces import Placement
from vllm_di.errors import ConfigError, EngineDeadError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int16]
COUNTS = [0, 1, 15, 16, 17, 1000, 2048, 50_001]
"""A piece is 4 KiB: the last ones go in several."""


@pytest.mark.parametrize("world", [2, 3])
def test_processes_get_what_gloo_gives(world: int) -> None:
    """Two ranks: the same bits. Three: gloo sums in another order, so only to rounding."""
    assert on_processes(world, same_as_gloo) == [[]] * world


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_exact_and_the_same_on_all_ranks(world: int, dtype: torch.dtype) -> None:
    """Summed in rank order in fp32 (fp64, or whole numbers that wrap) and rounded once."""
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    def want(count: int) -> Tensor:
        total = values(0, count, dtype).to(wide)
        for rank in range(1, world):
            total = total + values(rank, count, dtype).to(wide)
        return total.to(dtype)

    sums = on_threads(
        world, lambda c: [c.all_reduce(values(c.rank, count, dtype)) for count in COUNTS]
    )
    for count, *got in zip(COUNTS, *sums, strict=True):
        assert all(torch.equal(one, want(count)) for one in got), count


def added(parts: list[Tensor], c: Rank) -> Tensor:
    return c.all_reduce(parts[c.rank].clone())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_at_the_edges(dtype: torch.dtype) -> None:
    """Every number of 16 bits plus nothing, and plus its neighbour: infinities, NaN, ties. bf16
    below the smallest normal number is left out: AVX-512 takes it for zero."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    if dtype is torch.bfloat16:
        x = x[~(x.abs() < torch.finfo(dtype).tiny) | (x == 0)]
    for other in (torch.zeros_like(x), x.roll(1)):
        want = (x.float() + other.float()).to(dtype)
        usual = ~want.isnan()
        if dtype is torch.bfloat16:
            usual &= (want == 0) | (want.abs() >= torch.finfo(dtype).tiny)
        for got in on_threads(2, partial(added, [x, other])):
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got[usual], want[usual])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_dimensions_and_strides(world: int, dim: int) -> None:
    """Along any dimension, from tensors that are not contiguous; into them too."""

    def at(rank: int) -> Tensor:  # [6, 12, 18], its memory in another order
        return values(rank, 6 * 12 * 18, torch.float32).view(18, 6, 12).permute(1, 2, 0)

    whole = torch.cat([at(rank) for rank in range(world)], dim)
    for got in on_threads(world, lambda c: c.all_gather(at(c.rank), dim)):
        assert torch.equal(got, whole)


@pytest.mark.parametrize("world", [2, 3])
def test_a_dead_process_is_named_soon(world: int) -> None:
    """The last rank is killed while the others wait for it."""
    address, last = free_address(), world - 1
    context = multiprocessing.get_context("spawn")
    victim = context.Process(target=dies, args=(address, last, world, 0.5))
    victim.start()
    errors: list[str] = []
    begin: list[float] = []

    def survive(rank: int) -> None:
        communicator = join(Placement(rank, world, address))
        meet(communicator)
        begin.append(time.monotonic())
        with pytest.raises(EngineDeadError) as raised:
            communicator.all_reduce(torch.ones(9))
        errors.append(str(raised.value))
        communicator.close()

    threads = [threading.Thread(target=survive, args=(rank,)) for rank in range(last)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    victim.join()
    assert time.monotonic() - begin[0] < 10
    assert len(errors) == last
    assert all(f"rank {last} died while rank" in error for error in errors)


def test_a_rank_that_leaves_or_is_late_is_named() -> None:
    def leave(c: Rank) -> str:
        if c.rank == 1:
            return ""
        with pytest.raises(EngineDeadError) as raised:
            meet(c)
        return str(raised.value)

    assert on_threads(2, leave)[0] == "rank 1 left the group while rank 0 waited for it"

    missed = threading.Event()

    def late(c: Rank) -> str:
        if c.rank == 1:
            missed.wait(60)
            return ""
        with pytest.raises(EngineDeadError) as raised:
            meet(c)
        missed.set()
        return str(raised.value)

    assert "rank 1 did not join in time" in on_threads(2, late, timeout=2)[0]


def test_waiting_sleeps() -> None:
    """A second of waiting takes next to no processor time, though spinning is allowed for 1 ms."""

    def run(c: Rank) -> float:
        if c.rank == 1:
            time.sleep(1)
        used = resource.getrusage(resource.RUSAGE_THREAD)
        meet(c)
        after = resource.getrusage(resource.RUSAGE_THREAD)
        return after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime

    assert on_threads(2, run, spin=1000)[0] < 0.1


def test_nothing_is_left_behind() -> None:
    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:vllm-di")

    def run(c: Rank) -> int:
        meet(c)
        mapped = maps()
        meet(c)
        return mapped

    on_threads(2, run)
    before = files()
    seen = on_threads(2, run)
    assert seen == [2, 2]
    assert (files(), maps()) == (before, 0)
    assert not [name for name in os.listdir("/dev/shm") if "vllm-di" in name]


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = join(Placement())
    x = torch.ones(3)
    assert alone.all_reduce(x) is x
    with pytest.raises(TypeError, match=r"no sum over ranks of torch\.bool"):
        on_threads(2, lambda c: c.all_reduce(torch.ones(2, dtype=torch.bool)))
    with pytest.raises(EngineDeadError, match="the 2 ranks did not meet on this host"):
        join(Placement(1, 2, free_address()), timeout=0.3)
    with pytest.raises(EngineDeadError, match="the 2 ranks did not meet on this host"):
        join(Placement(0, 2, free_address()), timeout=0.3)
    with pytest.raises(ConfigError, match="piece: 'much' is not a size"):
        join(Placement(0, 2, free_address()), piece="much")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"needs its kernels: no C\+\+ compiler"):
        join(Placement(0, 2, free_address()), cache=str(tmp_path))


def test_it_serves_and_a_killed_worker_ends_it_soon() -> None:
    overrides = ["platform=cpu", "executor=multiprocess", "executor.tensor_parallel_size=2"]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM("tiny", overrides=overrides) as llm:
        want = llm.generate("hello", params)[0].outputs[0].token_ids
    with LLM("tiny", overrides=[*overrides, "communicator=shared_memory"]) as llm:
        assert llm.generate("hello", params)[0].outputs[0].token_ids == want
        workers = psutil.Process().children()
        [second] = [w for w in workers if '"rank":1' in " ".join(w.cmdline())]
        second.send_signal(9)
        while second.status() != psutil.STATUS_ZOMBIE:  # else the first may fail for want of it
            time.sleep(0.01)
        with pytest.raises(EngineDeadError, match=r"worker 1 was killed by signal 9"):
            llm.generate("hello", params)
