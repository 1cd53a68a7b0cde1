"""Triton kernels, as the ops launch them, compiled for GPUs that are not here.

All of them on all targets are the conformance suite's compile check (``make test-compile``); here
is one kernel for each target, and what only a test asks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_di.components.ops import triton_compile
from vllm_di.components.ops.triton import TritonOps
from vllm_di.components.ops.triton_compile import ATTENTION, TritonCompile
from vllm_di.containers.assembly import assemble
from vllm_di.errors import ConfigError
from vllm_di.kernels.triton.compile import Compiled, Compiler
from vllm_di.kernels.triton.targets import TARGETS
from vllm_di.kernels.triton.tiles import SMALLEST, TILINGS, tiling_of

HERE = [name for name in TARGETS if TARGETS[name].gpu.backend in ("cuda", "hip")]
"""Those that the pinned Triton compiles for; Intel's are in tests/ports/xpu."""
every_target = pytest.mark.parametrize("target", HERE)


def compiled(target: str, call: Callable[[TritonOps], object]) -> list[Compiled]:
    """What a call of an op compiles to. Nothing runs."""
    ops = TritonOps(programs=528, num_stages=None)
    ops.launch, ops.architecture = Compiler(target), target
    call(ops)
    assert ops.launch.made
    for made in ops.launch.made:
        assert made.usage.shared_bytes <= TARGETS[target].shared_bytes, made
        assert made.code.get("cubin") or made.code.get("hsaco")
    return ops.launch.made


def attention(
    target: str,
    shape: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    heads: tuple[int, int] = (32, 8),
    size: int = 128,
    window: int | None = None,
    soft_cap: float | None = None,
) -> list[Compiled]:
    tokens, seqs = ATTENTION[shape]
    cache = torch.empty(4, heads[1], 32, size, dtype=dtype)
    q = torch.empty(tokens, (heads[0] + 2 * heads[1]) * size, dtype=dtype)
    q = q[:, : heads[0] * size].unflatten(1, (heads[0], size))
    starts, lengths = torch.zeros(seqs + 1, dtype=torch.int32), torch.zeros(seqs, dtype=torch.int32)
    table = torch.zeros(seqs, 256, dtype=torch.int32)
    return compiled(
        target,
        lambda ops: ops.paged_attention(
            q, cache, cache, starts, lengths, table, 0.1, window, soft_cap
        ),
    )


def worker(*overrides: str) -> dict[str, Any]:
    found: dict[str, Any] = assemble(["platform=cuda", "model=tiny", *overrides]).stages[0]
    return found


@every_target
def test_a_kernel_of_each_target_is_within_its_bars(target: str) -> None:
    (made,) = TritonCompile(worker()).compile("add_rms_norm", target)
    assert made.name == "add_rms_norm_kernel"
    assert not made.beyond()
    assert 0 < made.figures["registers"] <= 256
    assert 0 < made.figures["code_bytes"] < 32768


def test_the_figures_are_those_of_the_code() -> None:
    """ptxas runs a second time for its figures: it must make the kernel that Triton made."""
    (made, merge) = attention("sm_90", "decode")
    assert made.usage.registers == registers_in_cubin(made.code["cubin"])
    assert merge.usage.registers == registers_in_cubin(merge.code["cubin"])
    assert made.usage.shared_bytes > 32768
    (made, _) = attention("gfx942", "decode")
    assert f".vgpr_count:     {made.usage.registers}" in made.code["amdgcn"]


def registers_in_cubin(cubin: bytes) -> int:
    """The attribute EIATTR_REGCOUNT (0x2f) of its one kernel: format, length, symbol, count."""
    at = cubin.index(b"\x04\x2f\x08\x00")
    return int.from_bytes(cubin[at + 8 : at + 12], "little")


def test_a_bar_that_is_exceeded_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = {**TARGETS, "gfx942": replace(TARGETS["gfx942"], shared_bytes=1024, code_bytes=1024)}
    monkeypatch.setattr("vllm_di.kernels.triton.targets.TARGETS", tight)
    made, _ = TritonCompile(worker()).compile("paged_attention decode", "gfx942")
    shared, code = made.beyond()
    assert re.fullmatch(r"attention_kernel takes 32,768 shared_bytes, and the bar is 1,024", shared)
    assert "code_bytes" in code
    assert "ops.library.num_stages" in made.advice
    assert "gfx942" in made.advice


def test_the_users_own_choice_is_what_is_compiled() -> None:
    two = TritonCompile(worker("ops.library.num_stages=2"))
    (made, _) = two.compile("paged_attention decode", "sm_90")
    assert made.figures["num_stages"] == 2
    with pytest.raises(ConfigError, match="kernels of ops=triton"):
        TritonCompile(worker("ops=torch", "attention=sdpa"))


def test_every_op_of_the_library_is_compiled() -> None:
    from vllm_di.components.ops.triton import TritonOps

    parts = {part.split()[0] for part in triton_compile.LAUNCHES}
    assert parts == TritonOps.implements - {"linear"}, "products are the vendor's"


def test_the_shapes_are_those_of_llama3() -> None:
    node = assemble(["platform=cuda", "model=llama3", "loader=dummy"]).stages[0]["model"]
    sizes = ["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
    assert [node[key] for key in [*sizes, "intermediate_size", "vocab_size"]] == [
        triton_compile.HIDDEN,
        triton_compile.HEADS,
        triton_compile.KV_HEADS,
        triton_compile.HEAD_SIZE,
        triton_compile.MLP,
        triton_compile.VOCAB,
    ]


def test_tiles_follow_the_architecture() -> None:
    assert set(TILINGS) == set(TARGETS)
    rows = {
        name: tiling_of(name)[0] for name in ("sm_89", "sm_121", "gfx90a", "gfx1101", "gfx1200")
    }
    assert rows == {
        "sm_89": "sm_80",
        "sm_121": "sm_120",
        "gfx90a": "gfx942",
        "gfx1101": "gfx1100",
        "gfx1200": "gfx1201",
    }
    assert tiling_of("dg2") == ("smallest", SMALLEST)
    decode = {name: row.tile(128, 4, 4, 2) for name, row in TILINGS.items()}
    assert decode["gfx942"].columns == 64
    assert decode["gfx1100"].columns == 32


def test_decode_has_128_bit_loads_and_matrix_products() -> None:
    ptx = attention("sm_90", "decode")[0].code["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global[^;]*0x10", ptx), "16 bytes a copy"
    assert "mma.sync" in ptx
    assert "wgmma" in attention("sm_90", "prefill")[0].code["ptx"]
    assert "tcgen05.mma" in attention("sm_100", "prefill")[0].code["ptx"]


@pytest.mark.slow
@every_target
@pytest.mark.parametrize("shape", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_attention_of_every_head_size(target: str, shape: str, dtype: torch.dtype) -> None:
    for size, heads in itertools.product([64, 80, 96, 256], [(32, 8), (14, 2), (8, 8)]):
        attention(target, shape, dtype, size=size, heads=heads)
    attention(target, shape, dtype, heads=(71, 1))


@pytest.mark.slow
@every_target
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention_with_windows_and_soft_caps(target: str, shape: str) -> None:
    attention(target, shape, window=4096)
    attention(target, shape, soft_cap=50.0)
    attention(target, shape, size=256, heads=(8, 4), window=4096, soft_cap=50.0)
