"""Products and attention by tile registers, in plain C++: every case of the suite, edges of blocks,
and what cannot use them."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from tests.components.ops.libraries import ISAS, close, library, random
from tests.components.ops.test_paged_attention import attend

from vllm_di import LLM, SamplingParams
from vllm_di.components.device.host import HostDevice
from vllm_di.components.ops.cpu import CpuOps
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.quantized import by_channel, by_group
from vllm_di.conformance.checks.test_ops import compare
from vllm_di.conformance.op_cases import cases
from vllm_di.errors import ConfigError
from vllm_di.kernels import isa as sets
from vllm_di.kernels.build import COMMON_FLAGS, SOURCES

BF16 = torch.bfloat16
HOST = torch.device("cpu")
PRODUCTS = ("linear", "gated_linear", "quantized_linear", "gated_quantized_linear")
ALL_OPS = """
#include "tiles.h"
extern "C" void all_ops(const char* from, char* to) {
  tile_config();
  tile_zero(0);
  tile_load(1, from, 64);
  tile_load(2, from, 128);
  tile_dot_bf16(0, 1, 2);
  tile_dot_int8(0, 1, 2);
  tile_store(0, to, 64);
  tile_release();
}
"""


def emulated(rows_for_tiles: int) -> CpuOps:
    device = HostDevice(threads=2, memory_budget=None, default_dtype="float32")
    return CpuOps(
        device,
        isa="amx_emulated",
        compile="require",
        cache=None,
        rows_for_onednn=None,
        rows_for_tiles=rows_for_tiles,
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("op", PRODUCTS)
def test_the_cases_of_the_suite(op: str, dtype: torch.dtype) -> None:
    ops = SelectedOps(library("amx_emulated"))
    for case in cases(op, dtype, seed=0):
        compare(ops, op, case, HOST)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 191, 192, 193, 400])
@pytest.mark.parametrize("inputs", [2, 30, 32, 34, 160])
def test_blocks_that_are_not_full(rows: int, inputs: int) -> None:
    ops = library("amx_emulated")
    x, weight = random(rows, inputs, dtype=BF16), random(70, inputs, dtype=BF16)
    close(ops.linear(x, ops.pack_linear(weight)), x.float() @ weight.float().T, inputs**0.5)


def test_what_is_not_a_number_stays_in_its_row_and_output() -> None:
    """The rest of a block is filled up with zeros, and zero times infinity is no number."""
    ops = library("amx_emulated")
    x, weight = random(40, 34, dtype=BF16), random(70, 34, dtype=BF16)
    x[7, 33], weight[33, 0] = float("inf"), float("nan")
    got = ops.linear(x, ops.pack_linear(weight))
    strange = ~got.isfinite()
    assert strange[7].all()
    assert strange[:, 33].all()
    assert strange.sum() == 40 + 70 - 1


@pytest.mark.parametrize("rows", [1, 16, 33, 200])
@pytest.mark.parametrize("inputs", [32, 64, 96, 320])
def test_bytes_by_tiles_are_the_same_bits(rows: int, inputs: int) -> None:
    """By channel: sums are whole numbers up to the end."""
    plain = library(next(isa for isa in ISAS if isa not in ("amx", "amx_emulated")))
    packed = plain.pack_quantized(by_channel(random(70, inputs)))
    x = random(rows, inputs, dtype=BF16)
    want = plain.quantized_linear(x, packed)
    assert torch.equal(library("amx_emulated").quantized_linear(x, packed), want)


@pytest.mark.parametrize("rows", [1, 16, 33, 200])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_groups_by_tiles(rows: int, bits: int, dtype: torch.dtype) -> None:
    """In bf16: two roundings of 8 bits of what is summed."""
    ops, weight = library("amx_emulated"), by_group(random(70, 160), bits)
    x = random(rows, 160, dtype=dtype)
    got = ops.quantized_linear(x, ops.pack_quantized(weight), None, torch.float32)
    exact, wide = x.float(), weight.dequantize(torch.float32)
    off = (got - exact @ wide.T).abs()
    assert (off <= 2 * 2**-9 * (exact.abs() @ wide.abs().T) + 1e-4).all()


def test_few_rows_take_the_other_path() -> None:
    plain = next(isa for isa in ISAS if isa != "amx")
    weight, x = random(64, 576, dtype=BF16), random(9, 576, dtype=BF16)
    packed = library(plain).pack_linear(weight)
    few, tiled, below, from_here = (
        ops.linear(x, packed, None, torch.float32)
        for ops in (library(plain), library("amx_emulated"), emulated(10), emulated(9))
    )
    assert not torch.equal(few, tiled)  # another order of the sums
    assert torch.equal(below, few)
    assert torch.equal(from_here, tiled)


@pytest.mark.parametrize("queries", [9, 16, 17, 31, 32, 33, 191, 193])
def test_attention_of_prompts(queries: int) -> None:
    """In bf16, whatever number of rows is left for the last block."""
    close(*attend("amx_emulated", [(queries, 300)], heads=(2, 2)))


def test_attention_takes_tiles_for_prompts_in_bf16_alone() -> None:
    plain = next(isa for isa in ISAS if isa != "amx")
    sequences = [(193, 300), (8, 300)]
    tiled, few = (attend(isa, sequences, heads=(2, 2))[0] for isa in ("amx_emulated", plain))
    assert not torch.equal(tiled[:193], few[:193])  # another order of the sums
    assert torch.equal(tiled[193:], few[193:])
    one, other = (attend(i, sequences, dtype=torch.float32)[0] for i in ("amx_emulated", plain))
    assert torch.equal(one, other)


def test_attention_goes_by_tiles_where_products_do() -> None:
    """``explain`` says it."""
    said = "prompts in bf16 by tiles"
    plain = next(isa for isa in ISAS if isa not in ("amx", "amx_emulated"))
    assert said in library("amx_emulated").describe()["paged_attention"]
    assert said not in library(plain).describe()["paged_attention"]


def test_experts_of_few_tokens_take_the_other_path() -> None:
    plain = next(isa for isa in ISAS if isa != "amx")
    gate_up, down = random(2, 256, 1024, dtype=BF16) / 32, random(2, 1024, 128, dtype=BF16) / 11
    x, ids = random(80, 1024, dtype=BF16), torch.tensor([[0]] * 64 + [[1]] * 16)
    few, tiled, between = (
        ops.fused_experts(x, gate_up, down, torch.ones(80, 1), ids, "silu")
        for ops in (library(plain), library("amx_emulated"), emulated(17))
    )
    assert not torch.equal(few[:64], tiled[:64])  # another order of the sums, seen after rounding
    assert torch.equal(between[:64], tiled[:64])  # expert 0 has 64 tokens, expert 1 has 16
    assert torch.equal(between[64:], few[64:])


@pytest.mark.parametrize(
    ("dtype", "quantization", "bound"),
    [
        ("float32", "none", 1e-4),
        ("bfloat16", "none", 0.02),
        ("float32", "int8", 1e-4),
        ("bfloat16", "int8", 0.02),
        ("float32", "int4", 0.02),
    ],
)
def test_a_model_answers_alike(dtype: str, quantization: str, bound: float) -> None:
    """Prompts by tiles, decodes by tiles on tapes: the same greedy tokens, and log-probs within
    ``bound`` nat in all."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    model = ["platform=cpu", f"model.dtype={dtype}", f"quantization={quantization}"]
    answers = []
    for isa in ("auto", "amx_emulated"):
        chosen = [f"ops.library.isa={isa}", "ops.library.rows_for_tiles=1"]
        with LLM("tiny", overrides=[*model, *chosen]) as llm:
            out = llm.generate(["hello world, and all that is in it", "a"], params)
            answers.append([(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in out])
    for (tokens, score), (others, other) in zip(*answers, strict=True):
        assert tokens == others
        assert score == pytest.approx(other, abs=bound)


@pytest.mark.skipif(bool(sets.compiler_lacks_tiles()), reason="the compiler does not know AMX")
def test_the_instructions_compile(tmp_path: Path) -> None:
    """All names of the header, as instructions, and its shapes are stored before they are read."""
    source, assembly = tmp_path / "ops.cpp", tmp_path / "ops.s"
    source.write_text(ALL_OPS)
    flags = [*COMMON_FLAGS, *sets.flags_of("amx"), f"-I{SOURCES}"]
    compiler = sets.find_compiler()
    assert compiler is not None
    subprocess.run([compiler, *flags, "-c", source, "-o", tmp_path / "ops.o"], check=True)
    subprocess.run([compiler, *flags, "-S", source, "-o", assembly], check=True)
    lines = assembly.read_text().splitlines()
    config = next(at for at, line in enumerate(lines) if "ldtilecfg" in line)
    assert any("$1," in line or "72340172838076673" in line for line in lines[:config])
    names = ("tilezero", "tileloadd", "tdpbf16ps", "tdpbsud", "tilestored", "tilerelease")
    for name in names:
        assert any(name in line for line in lines[config:]), name


def refused(monkeypatch: pytest.MonkeyPatch, cause: str) -> str:
    """A CPU with AMX, where ``cause`` keeps it from being used; returns the reason."""
    others = [isa for isa in sets.usable_isas() if isa != "amx"]
    monkeypatch.setattr(sets, "usable_isas", lambda: ["amx", *others])
    reasons = {"tiles_refused": "", "compiler_lacks_tiles": ""} | {cause: "it is Sunday"}
    for name, reason in reasons.items():
        monkeypatch.setattr(sets, name, lambda reason=reason: reason)
    return "it is Sunday"


@pytest.mark.parametrize("cause", ["tiles_refused", "compiler_lacks_tiles"])
def test_without_permission_the_next_path_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    reason = refused(monkeypatch, cause)
    device = HostDevice(threads=2, memory_budget=None, default_dtype="float32")
    ops = CpuOps(device, isa="auto", compile="require", cache=None, rows_for_onednn=None)
    assert ops.isa == next(isa for isa in ISAS if isa != "amx")
    assert f"{ops.isa}; no amx: {reason}" in ops.describe()["linear"]
    with pytest.raises(ConfigError, match=f"isa=amx: {reason}; isa=auto takes"):
        CpuOps(device, isa="amx", compile="auto", cache=None, rows_for_onednn=None)


def test_the_kernel_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Libc:
        def syscall(self, *numbers: int) -> int:
            asked.append(numbers)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc())
    monkeypatch.setattr(ctypes, "get_errno", lambda: 95)
    assert "the kernel refuses tile registers" in sets.tiles_refused.__wrapped__()
    assert asked == [(158, 0x1023, 18)]


def test_a_compiler_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\necho 'g++: error: unrecognized option -mamx-tile' >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setattr(sets, "find_compiler", lambda: str(old))
    why = sets.compiler_lacks_tiles.__wrapped__()
    assert why == "g++ does not know AMX: g++: error: unrecognized option -mamx-tile"
