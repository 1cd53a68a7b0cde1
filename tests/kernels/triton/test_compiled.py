"""Every Triton kernel, as the ops launch it, compiled for GPUs that are not here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch

from vllm_di.components.ops.triton import TritonOps
from vllm_di.kernels.triton.compile import SHARED_MEMORY, TARGETS, Compiled, Compiler

STAGES = {"gfx942": 2}
"""As conf/platform/rocm.yaml has it; the others take the default of conf/ops/triton.yaml."""
SHAPES = {"decode": (1, 1), "chunk": (16, 1), "prefill": (4096, 2)}
"""(tokens, sequences): one for each of attention's tiles."""
every_target = pytest.mark.parametrize("target", TARGETS)


def compiled(target: str, call: Callable[[TritonOps], object]) -> list[Compiled]:
    """What a call of an op compiles to. Nothing runs."""
    ops = TritonOps(programs=528, num_stages=STAGES.get(target, 3))
    ops.launch = compiler = Compiler(target)
    call(ops)
    assert compiler.made
    for made in compiler.made:
        assert made.shared_bytes <= SHARED_MEMORY[target] * 1024, (made.kernel, made.shared_bytes)
        assert made.code.get("cubin") or made.code.get("hsaco")
    return compiler.made


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
    tokens, seqs = SHAPES[shape]
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


@every_target
def test_norms_rotary_gates_and_cache_writes(target: str) -> None:
    bf16 = torch.bfloat16
    x, weight = torch.empty(2, 4096, dtype=bf16), torch.empty(4096, dtype=bf16)
    qkv = torch.empty(2, 6144, dtype=bf16)
    q, k, v = (
        part.unflatten(1, (-1, 128)) for part in qkv.split([4096, 1024, 1024], -1)
    )  # strided, as the model has them
    cache = torch.empty(4, 8, 32, 128, dtype=bf16)
    ids = torch.zeros(2, dtype=torch.int64)
    calls: list[Callable[[TritonOps], object]] = [
        lambda ops: ops.rms_norm(x, weight, 1e-5),
        lambda ops: ops.rms_norm(q[:1].expand(64, -1, -1), weight[:128], 1e-5),
        lambda ops: ops.add_rms_norm(x, x.clone(), weight, 1e-5),
        lambda ops: ops.rotary_embedding(ids, q, k, torch.empty(9, 128), False),
        lambda ops: ops.rotary_embedding(ids, q, k, torch.empty(9, 64), True),
        lambda ops: ops.silu_and_mul(torch.empty(2, 28672, dtype=bf16)),
        lambda ops: ops.gelu_tanh_and_mul(torch.empty(2, 28672, dtype=bf16)),
        lambda ops: ops.write_kv(k, v, cache, cache, ids),
        lambda ops: ops.rotary_write_kv(
            ids, q, k, v, torch.empty(9, 128), False, cache, cache, ids
        ),
    ]
    for call in calls:
        compiled(target, call)


@every_target
def test_sampling(target: str) -> None:
    logits, reals = torch.empty(2, 128256), torch.empty(2)
    compiled(target, lambda ops: ops.greedy_sample(logits))
    ids = torch.zeros(2, dtype=torch.int64)
    compiled(target, lambda ops: ops.top_k_top_p_sample(logits, ids, reals, reals, reals))


@every_target
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(target: str, shape: str) -> None:
    kernels = [made.kernel for made in attention(target, shape)]
    assert kernels == ["attention_kernel"] + ["merge_kernel"] * (shape != "prefill")


def test_decode_has_128_bit_loads_and_matrix_products() -> None:
    ptx = attention("sm_90", "decode")[0].code["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global[^;]*0x10", ptx), "16 bytes a copy"
    assert "mma.sync" in ptx
    assert "wgmma" in attention("sm_90", "prefill")[0].code["ptx"]
    assert "tcgen05.mma" in attention("sm_100", "prefill")[0].code["ptx"]


@pytest.mark.slow
@every_target
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_attention_of_every_head_size(target: str, shape: str, dtype: torch.dtype) -> None:
    for size, heads in itertools.product([64, 80, 96, 256], [(32, 8), (14, 2), (8, 8)]):
        attention(target, shape, dtype, size=size, heads=heads)
    attention(target, shape, dtype, heads=(71, 1))


@pytest.mark.slow
@every_target
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_with_windows_and_soft_caps(target: str, shape: str) -> None:
    attention(target, shape, window=4096)
    attention(target, shape, soft_cap=50.0)
    attention(target, shape, size=256, heads=(8, 4), window=4096, soft_cap=50.0)
