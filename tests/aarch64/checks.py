"""Kernels for aarch64, run by QEMU (``make test-aarch64``; the tests of ops run so too): the cases
of the conformance suite, threads, and ranks over shared memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.aarch64.guest import SESSION, GuestLibrary
from tests.components.communicator.ranks import values
from tests.components.ops.libraries import DTYPES, ISAS, library, random
from tests.components.ops.test_paged_attention import attend
from torch import Tensor

from vllm_di import LLM, SamplingParams
from vllm_di.components.communicator.shared_memory import KINDS
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.quantized import by_channel, by_group
from vllm_di.conformance.checks.test_ops import compare
from vllm_di.conformance.op_cases import MAKERS, cases
from vllm_di.kernels.bindings import GroupKernels
from vllm_di.kernels.isa import EMULATED, isas_of

HOST = torch.device("cpu")
PIECE = 4096
DIED = 1 << 16
"""A trouble of group.cpp; the rank is added."""

every_isa = pytest.mark.parametrize("isa", ISAS)


def test_all_instruction_sets_are_here() -> None:
    assert [*isas_of("aarch64"), EMULATED] == ISAS


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", MAKERS)
def test_the_cases_of_the_suite(isa: str, dtype: torch.dtype, op: str) -> None:
    ops = SelectedOps(library(isa))
    assert ops.library_of(op) is library(isa)
    for case in cases(op, dtype, seed=0):
        compare(ops, op, case, HOST)


def computed(isa: str) -> list[Tensor]:
    """By kernels whose threads wait for each other."""
    ops, x = library(isa), random(40, 320, dtype=torch.bfloat16)
    weight = random(130, 320)
    ids = torch.arange(80).view(40, 2) % 3
    gate_up, down = random(3, 192, 320).bfloat16() / 18, random(3, 320, 96).bfloat16() / 10
    return [
        ops.linear(x, ops.pack_linear(weight.bfloat16())),
        ops.quantized_linear(x, ops.pack_quantized(by_channel(weight))),
        ops.quantized_linear(x, ops.pack_quantized(by_group(weight, 4))),
        ops.fused_experts(x, gate_up, down, torch.full((40, 2), 0.5), ids, "silu"),
        attend(isa, [(1, 700), (40, 130)])[0],
    ]


@every_isa
def test_two_threads_compute_what_one_does(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many times: a barrier that lets one pass too early loses only now and then."""
    assert library(isa).threads == 2
    with monkeypatch.context() as alone:
        alone.setattr(library(isa), "threads", 1)
        wanted = computed(isa)
    for _ in range(5):
        assert all(map(torch.equal, computed(isa), wanted))


@contextlib.contextmanager
def two_ranks(config: pytest.Config, isa: str) -> Iterator[list[tuple[GuestLibrary, Any, int]]]:
    """Of each rank its guest, its kernels and its group. A rank hears of the other's end by a pipe
    that the other alone holds open."""
    session = config.stash[SESSION]
    memory = os.memfd_create("group")
    ends = [os.pipe(), os.pipe()]
    guests = [session.guest(isa, [memory, ends[r][1], ends[1 - r][0]]) for r in range(2)]
    for _, writing in ends:
        os.close(writing)
    watched = torch.tensor([reading for reading, _ in ends], dtype=torch.int32)
    found = []
    for rank, guest in enumerate(guests):
        kernels = GroupKernels(guest)  # type: ignore[arg-type]
        os.ftruncate(memory, kernels.bytes(2, PIECE))
        group = kernels.open(memory, rank, 2, PIECE, 0, 60 * 10**9, watched.data_ptr())
        found.append((guest, kernels, group))
    try:
        yield found
    finally:
        for guest in guests:
            guest.close()
        for fd in (memory, *(reading for reading, _ in ends)):
            os.close(fd)


@pytest.mark.parametrize("isa", isas_of("aarch64"))
def test_ranks_over_shared_memory(pytestconfig: pytest.Config, isa: str) -> None:
    with two_ranks(pytestconfig, isa) as ranks, ThreadPoolExecutor(2) as pool:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int16):
            for count in (0, 1, 17, 5001):
                parts = [values(rank, count, dtype) for rank in range(2)]
                outs = [torch.empty_like(part) for part in parts]

                def add(rank: int, parts: list[Tensor] = parts, outs: list[Tensor] = outs) -> Any:
                    _, kernels, group = ranks[rank]
                    x, out = parts[rank], outs[rank]
                    kind = KINDS[x.dtype]
                    return kernels.all_reduce(group, kind, x.data_ptr(), out.data_ptr(), x.numel())

                assert list(pool.map(add, range(2))) == [0, 0]
                for out in outs:
                    assert torch.equal(out, parts[0] + parts[1])


def test_a_rank_that_died_is_named(pytestconfig: pytest.Config) -> None:
    with two_ranks(pytestconfig, "generic") as ranks:
        ranks[1][0].process.kill()
        _, kernels, group = ranks[0]
        x = values(0, 100, torch.float32)
        assert kernels.all_reduce(group, 0, x.data_ptr(), x.data_ptr(), 100) == DIED | 1


@pytest.mark.parametrize("isa", isas_of("aarch64"))
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_answers_alike(isa: str, quantization: str) -> None:
    """Prompts, and decodes on tapes: the greedy tokens of the torch reference."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    model = ["platform=cpu", "model.dtype=float32", f"quantization={quantization}"]
    answers = []
    for ops in (["ops=torch"], [f"ops.library.isa={isa}", "ops.library.rows_for_tiles=1"]):
        with LLM("tiny", overrides=[*model, *ops]) as llm:
            outputs = llm.generate(["hello world, and all that is in it", "a"], params)
            answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]
