"""The Triton kernels against the reference: in Triton's interpreter on the host, or on a GPU.

``test_numerics.py`` runs them interpreted, in a process of its own: whether a kernel is interpreted
is decided when it is defined. Shapes are tiny, as each program then takes milliseconds. Run as they
are, on a machine with a GPU, the same tests hold for the compiled kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.components.ops.libraries import close, random
from torch import Tensor

from vllm_di import LLM, SamplingParams
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.ops.triton import Launch, TritonOps

# the interpreter computes with numpy, which warns where a GPU gives infinity
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
REFERENCE = TorchOps()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class There:
    """Runs the ops of a library where its kernels run, on host tensors: they go there with their
    strides, and what was changed in place comes back. ``launch`` is another launcher, of host
    tensors."""

    def __init__(
        self, programs: int, architecture: str | None = None, launch: Launch | None = None
    ) -> None:
        self._ops = TritonOps(programs=programs, num_stages=2)
        self._on_host = INTERPRETED or launch is not None
        if architecture is not None:
            self._ops.architecture = architecture
        if launch is not None:
            self._ops.launch = launch

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op: Callable[..., Any] = getattr(self._ops, name)
        if self._on_host:
            return op

        def run(*arguments: Any) -> Any:
            moved = [_there(a) if isinstance(a, Tensor) else a for a in arguments]
            result = op(*moved)
            back = {}
            for mine, there in zip(arguments, moved, strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(there)
                    back[id(there)] = mine
            if isinstance(result, tuple):
                return tuple(back.get(id(part), part.cpu()) for part in result)
            return None if result is None else back.get(id(result), result.cpu())

        return run


def _there(tensor: Tensor) -> Tensor:
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return there.copy_(tensor)


TRITON = There(programs=1)
SPLITTING = There(programs=1000)
"""Cuts contexts into as many parts as they have."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
some_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
MIXED = [(1, 1), (1, 37), (5, 5), (0, 9), (7, 130)]
"""(queries, context) of each sequence."""


def wide(tensor: Tensor) -> Tensor:
    return tensor.float()


@some_dtypes
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [16, 12])
@pytest.mark.parametrize("cache_dtype", [None, torch.float16])
def test_rotary_and_write_in_one(
    dtype: torch.dtype, interleaved: bool, rotary: int, cache_dtype: torch.dtype | None
) -> None:
    """As one after the other, bit for bit; only addressed slots change."""
    qkv = random(5, 10 * 16, dtype=dtype)
    q, k, v = (part.unflatten(1, (-1, 16)) for part in qkv.split([96, 32, 32], -1))
    positions, table = torch.tensor([3, 0, 8, 1, 2]), random(9, rotary, seed=3)
    slots = torch.tensor([31, -1, 0, 7, 9])
    caches = [random(4, 2, 8, 16, dtype=cache_dtype or dtype, seed=n) for n in (4, 5)]
    want = [cache.clone() for cache in caches]
    turned = TRITON.rotary_embedding(positions, q.clone(), k.clone(), table, interleaved)
    TRITON.write_kv(turned[1], v, *want, slots)
    before = k.clone(), v.clone()
    got = TRITON.rotary_write_kv(positions, q, k, v, table, interleaved, *caches, slots)
    assert got is q and torch.equal(q, turned[0])
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])
    assert torch.equal(caches[0], want[0]) and torch.equal(caches[1], want[1])


@some_dtypes
@pytest.mark.parametrize("shape", [(5, 48), (1, 100), (3, 4, 16), (70, 20), (0, 8), (9,)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    close(TRITON.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(wide(x), weight, 1e-5))


def test_rms_norm_of_heads_inside_a_product() -> None:
    heads = random(5, 96)[:, 16:64].unflatten(1, (3, 16))
    weight = random(16)
    close(TRITON.rms_norm(heads, weight, 1e-6), REFERENCE.rms_norm(heads, weight, 1e-6))
    strided = random(4, 6, 8).transpose(1, 2)  # stride 6 in the last dimension
    close(TRITON.rms_norm(strided, random(6), 1e-6), REFERENCE.rms_norm(strided, random(6), 1e-6))


@some_dtypes
def test_add_rms_norm_works_in_place(dtype: torch.dtype) -> None:
    x, residual = random(5, 48, dtype=dtype), random(5, 48, dtype=dtype, seed=1)
    weight = random(48, dtype=dtype, seed=2)
    total = x + residual
    norm = REFERENCE.rms_norm(wide(total), weight, 1e-5)
    got, stream = TRITON.add_rms_norm(x, residual, weight, 1e-5)
    close(got, norm)
    close(stream, wide(total))
    assert stream is residual and got is x
    # the interpreter cuts bf16 off where a GPU rounds
    assert dtype is torch.bfloat16 or torch.equal(stream, total)


@some_dtypes
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [16, 12])
def test_rotary(dtype: torch.dtype, interleaved: bool, rotary: int) -> None:
    qkv = random(4, 6 * 16, dtype=dtype)
    q, k = qkv[:, :64].unflatten(1, (4, 16)), qkv[:, 64:80].unflatten(1, (1, 16))
    rest = qkv[:, 80:].clone()
    positions, table = torch.tensor([3, 0, 8, 1]), random(9, rotary, seed=3)
    want = REFERENCE.rotary_embedding(positions, wide(q), wide(k), table, interleaved)
    got = TRITON.rotary_embedding(positions, q, k, table, interleaved)
    close(got[0], want[0])
    close(got[1], want[1])
    assert torch.equal(qkv[:, 80:], rest)  # what lies beside it is left alone


@some_dtypes
@pytest.mark.parametrize("shape", [(5, 48), (3, 2000), (2, 3, 8), (0, 8), (6,)])
def test_gates(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = random(*shape, dtype=dtype)
    close(TRITON.silu_and_mul(x), REFERENCE.silu_and_mul(wide(x)))
    close(TRITON.gelu_tanh_and_mul(x), REFERENCE.gelu_tanh_and_mul(wide(x)))
    extreme = torch.tensor([[-1e4, 1e4, 0.0, -0.0, 1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    for name in ("silu_and_mul", "gelu_tanh_and_mul"):
        close(getattr(TRITON, name)(extreme), getattr(REFERENCE, name)(wide(extreme)))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
def test_write_kv_changes_the_addressed_slots_alone(cache_dtype: torch.dtype) -> None:
    keys = random(4, 3, 8, 12, dtype=cache_dtype)
    values = random(4, 3, 8, 12, dtype=cache_dtype, seed=1)
    want = keys.clone(), values.clone()
    k, v = random(6, 48)[:, :36].unflatten(1, (3, 12)), random(6, 3, 12, seed=2)
    slots = torch.tensor([31, -1, 0, 7, 9, -1])
    REFERENCE.write_kv(k, v, *want, slots)
    TRITON.write_kv(k, v, keys, values, slots)
    assert torch.equal(keys, want[0]) and torch.equal(values, want[1])


def attend(
    ops: There,
    sequences: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (6, 3),
    size: int = 16,
    block: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    padding: int = 0,
) -> None:
    """Blocks lie in any order, and are NaN until written; ``padding`` rows follow the last."""
    query, kv = heads
    blocks = [-(-context // block) for _, context in sequences]
    order = torch.randperm(sum(blocks) + 2, generator=torch.Generator().manual_seed(0)).int()
    table = torch.full((len(sequences), max(blocks, default=0) + 1), 2**30, dtype=torch.int32)
    nan = torch.full((sum(blocks) + 2, kv, block, size), float("nan"), dtype=cache_dtype or dtype)
    keys, values = nan.clone(), nan.clone()
    at = 0
    for row, ((_, context), count) in enumerate(zip(sequences, blocks, strict=True)):
        table[row, :count] = order[at : at + count]
        at += count
        place = torch.arange(context)
        slots = table[row, place // block].long() * block + place % block
        k, v = (random(context, kv, size, dtype=dtype, seed=row + s) for s in (10, 20))
        REFERENCE.write_kv(k, v, keys, values, slots)
    lengths = torch.tensor([q for q, _ in sequences])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    contexts = torch.tensor([c for _, c in sequences], dtype=torch.int32)
    qkv = random(int(lengths.sum()) + padding, (query + 2) * size, dtype=dtype)
    q = qkv[:, : query * size].unflatten(1, (query, size))
    rest = (starts, contexts, table, size**-0.5, window, soft_cap)
    got = ops.paged_attention(q, keys, values, *rest)
    want = REFERENCE.paged_attention(wide(q), wide(keys), wide(values), *rest)
    close(got, want)
    assert not got[len(got) - padding :].any()


both = pytest.mark.parametrize("ops", [TRITON, SPLITTING], ids=["whole", "split"])


@both
@some_dtypes
def test_attention_of_mixed_batches(ops: There, dtype: torch.dtype) -> None:
    attend(ops, MIXED, dtype=dtype)


@both
@pytest.mark.parametrize("window", [1, 5, 100])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_attention_windows_and_soft_caps(ops: There, window: int, soft_cap: float | None) -> None:
    attend(ops, [(1, 300), (5, 40)], window=window, soft_cap=soft_cap)


def test_attention_soft_cap_of_extreme_scores() -> None:
    attend(TRITON, [(3, 9)], soft_cap=1e-3)
    attend(TRITON, [(3, 9)], soft_cap=1e4)


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (24, 1)])
def test_attention_groups(heads: tuple[int, int]) -> None:
    attend(SPLITTING, [(1, 300), (9, 20)], heads=heads)


@pytest.mark.parametrize(("size", "block"), [(8, 7), (24, 32), (64, 16), (80, 64), (256, 16)])
def test_attention_head_and_block_sizes(size: int, block: int) -> None:
    attend(TRITON, [(1, 70), (4, 20)], heads=(2, 1), size=size, block=block)
    attend(SPLITTING, [(1, 300)], heads=(2, 1), size=size, block=block)


@pytest.mark.parametrize("architecture", ["sm_80", "gfx1100"])  # those with tiles of their own
def test_attention_tiles_of_other_architectures(architecture: str) -> None:
    ops = There(programs=1, architecture=architecture)
    attend(ops, [(1, 70), (4, 20)], heads=(2, 1), size=80, block=64)


def test_attention_cache_of_another_dtype() -> None:
    attend(TRITON, MIXED, dtype=torch.float32, cache_dtype=torch.float16)


@both
def test_attention_padding_rows_are_zero(ops: There) -> None:
    attend(ops, [(1, 300), (1, 2)], padding=6)


@both
def test_attention_of_sequences_without_a_context(ops: There) -> None:
    """What a captured graph pads a batch with: a query each, and no token to see."""
    keys = torch.full((20, 1, 16, 16), float("nan"))
    starts = torch.arange(4, dtype=torch.int32)
    table = torch.zeros(3, 20, dtype=torch.int32)
    out = ops.paged_attention(
        random(3, 2, 16), keys, keys, starts, starts[:3] * 0, table, 1.0, None, None
    )
    assert not out.any()


def test_greedy_takes_the_lowest_id_and_none_of_a_row_that_is_not_finite() -> None:
    logits = random(5, 10000)
    logits[0, 7] = logits[0, 9000] = 99.0
    logits[1, 8500] = float("nan")
    logits[1, 3] = float("inf")
    logits[2, :] = float("-inf")
    logits[3, 9999] = 50.0
    logits = torch.cat([logits, logits], -1)[:, :10000]
    assert torch.equal(TRITON.greedy_sample(logits), REFERENCE.greedy_sample(logits))


def draws(rows: int, vocab: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[:, 5:25] = logits[:, 5:6]  # ties
    logits[:, 30:33] = float("-inf")
    logits -= logits.amax(-1, keepdim=True)
    kinds = torch.arange(rows)
    top_k = torch.tensor([vocab, 1, 10, 40])[kinds % 4]
    top_p = torch.tensor([1.0, 0.9, 0.5, 0.05, 1.0])[kinds % 5]
    min_p = torch.tensor([0.0, 0.1, 1.0])[kinds % 3]
    uniform = torch.rand(rows, generator=generator)
    uniform[::7] = 0.0
    uniform[1::7] = 1 - 2.0**-24
    return logits, top_k, top_p, min_p, uniform


@pytest.mark.parametrize("vocab", [50, 300])
def test_sampling_draws_what_the_reference_draws(vocab: int) -> None:
    rows = draws(12, vocab, 0)
    assert torch.equal(TRITON.top_k_top_p_sample(*rows), REFERENCE.top_k_top_p_sample(*rows))


def test_sampling_over_several_blocks() -> None:
    rows = draws(2, 9000, 1)
    assert torch.equal(TRITON.top_k_top_p_sample(*rows), REFERENCE.top_k_top_p_sample(*rows))


def test_products_are_torchs() -> None:
    x, weight, bias = random(3, 8), random(5, 8, seed=1), random(5, seed=2)
    packed = TRITON.pack_linear(weight)
    # another library of products on a device: it sums in another order
    close(TRITON.linear(x, packed, bias), REFERENCE.linear(x, weight, bias))
    half = x.half(), weight.half()
    got = TRITON.linear(*half, None, torch.float32)
    close(got, REFERENCE.linear(*half, None, torch.float32))


@some_dtypes
@pytest.mark.parametrize(("experts", "k"), [(4, 2), (9, 3)])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_experts(dtype: torch.dtype, experts: int, k: int, tokens: int) -> None:
    """Experts without a row, with one, with more than a tile; sizes that fill no tile."""
    x = random(tokens, 40, dtype=dtype)[:, 3:33]  # [tokens, 30]
    up, down = random(experts, 2 * 24, 30, dtype=dtype), random(experts, 30, 24, dtype=dtype)
    up, down = up / 6, down / 5  # so that products of them are about 1
    shares, ids = random(tokens, experts).softmax(-1).topk(k)
    ids[: tokens // 2] = ids[0]
    got = TRITON.fused_experts(x, up, down, shares, ids, "silu")
    want = REFERENCE.fused_experts(wide(x), wide(up), wide(down), shares, ids, "silu")
    close(got, want, scale=4.0)  # bf16 is rounded between the products too, and cut off here


def test_a_model_says_what_it_says_on_the_reference() -> None:
    """Prefill, chunks and decode through the engine; sizes padded as for graphs."""
    there = "cpu" if INTERPRETED else "cuda"
    common = ["model=tiny", "model.dtype=float32", "model.max_model_len=64", "worker.num_blocks=8"]
    common += ["kv_layout.block_size=16", "graph=eager"]
    common += ["scheduler.max_num_seqs=4", "scheduler.max_num_batched_tokens=16"]
    ours = [f"platform={there}", "ops=triton", "ops.library.programs=100", "attention=triton"]
    ours += ["shapes=capture_sizes"]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    drawn = SamplingParams(
        temperature=1, top_k=30, top_p=0.9, seed=1, max_tokens=3, ignore_eos=True
    )
    said = []
    for overrides in (["platform=cpu", "ops=torch"], ours):
        with LLM(overrides=[*common, *overrides]) as llm:
            prompts = [list(range(20, 43)), [7, 8, 9]]
            answers = llm.generate(prompts, params) + llm.generate(prompts[1:], drawn)
            said.append([answer.outputs[0].token_ids for answer in answers])
    assert said[0] == said[1]


@pytest.mark.slow
@some_dtypes
@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (8, 1)])
@pytest.mark.parametrize("size", [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_sweep(
    dtype: torch.dtype, heads: tuple[int, int], size: int, window: int | None
) -> None:
    for ops in (TRITON, SPLITTING):
        attend(
            ops, [(1, 37), (7, 130), (1, 400)], heads=heads, size=size, dtype=dtype, window=window
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_sampling_sweep(seed: int) -> None:
    rows = draws(40, 40 + 31 * seed, seed)
    assert torch.equal(TRITON.top_k_top_p_sample(*rows), REFERENCE.top_k_top_p_sample(*rows))
