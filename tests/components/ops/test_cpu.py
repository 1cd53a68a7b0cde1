"""Every C++ op on every instruction set of this machine equals the reference."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from tests.components.ops.libraries import DTYPES, ISAS, REFERENCE, close, library, random
from torch import Tensor

ROWS = [0, 1, 2, 5, 17]
SIZES = [1, 15, 64, 80, 577]

every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@every_isa
@every_dtype
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
class TestRows:
    """Ops on rows of numbers."""

    def test_rms_norm(self, isa: str, dtype: torch.dtype, rows: int, size: int) -> None:
        x, weight = random(rows, size, dtype=dtype), random(size, dtype=dtype)
        close(
            library(isa).rms_norm(x, weight, 1e-5),
            REFERENCE.rms_norm(x.float(), weight.float(), 1e-5),
        )

    def test_add_rms_norm(self, isa: str, dtype: torch.dtype, rows: int, size: int) -> None:
        x, residual, weight = (
            random(*s, dtype=dtype) for s in ((rows, size), (rows, size), (size,))
        )
        want = x + residual
        out, total = library(isa).add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
        assert torch.equal(total, want)
        close(out, REFERENCE.rms_norm(want.float(), weight.float(), 1e-6))

    @pytest.mark.parametrize("op", ["silu_and_mul", "gelu_tanh_and_mul"])
    def test_gates(self, isa: str, dtype: torch.dtype, rows: int, size: int, op: str) -> None:
        wide = 6 * random(rows, 2 * size + 3, dtype=dtype)
        x = wide[:, : 2 * size]  # a view with a stride
        close(getattr(library(isa), op)(x), getattr(REFERENCE, op)(x.float()))


@every_isa
@every_dtype
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(2, 1), (64, 16), (66, 33), (576, 130), (130, 577)]
)
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_linear(
    isa: str,
    dtype: torch.dtype,
    rows: int,
    inputs: int,
    outputs: int,
    out_dtype: torch.dtype | None,
) -> None:
    ops = library(isa)
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype)
    packed = ops.pack_linear(weight)
    exact = x.float() @ weight.float().T
    got = ops.linear(x, packed, None, out_dtype)
    assert got.dtype is (out_dtype or dtype)
    close(got, exact, inputs**0.5)
    bias = random(outputs, dtype=dtype)
    close(ops.linear(x, packed, bias, out_dtype), exact + bias.float(), inputs**0.5)


@every_isa
def test_linear_of_many_rows_takes_every_path(isa: str) -> None:
    ops, weight = library(isa), random(200, 96, dtype=torch.bfloat16)
    packed = ops.pack_linear(weight)
    for rows in (31, 32, 33, 63, 64, 65, 129, 300):
        x = random(rows, 100, dtype=torch.bfloat16)[:, :96]
        close(ops.linear(x, packed), x.float() @ weight.float().T, 10.0)


@every_isa
@every_dtype
@pytest.mark.parametrize(("inputs", "gap"), [(1024, 0), (2048, 0), (2048, 2048), (2046, 2)])
def test_linear_of_rows_whole_pages_apart(
    isa: str, dtype: torch.dtype, inputs: int, gap: int
) -> None:
    """Where they are many they are copied: to the same numbers, and nothing beside them."""
    ops, weight = library(isa), random(33, inputs, dtype=dtype)
    packed = ops.pack_linear(weight)
    wide = random(40, inputs + gap, dtype=dtype)
    wide[:, inputs:] = float("nan")
    for rows in (3, 12, 13, 40):
        x = wide[:rows, :inputs]
        got = ops.linear(x, packed)
        close(got, x.float() @ weight.float().T, inputs**0.5)
        near = torch.cat([x, x.new_zeros(rows, 34)], 1)[:, :inputs]
        assert torch.equal(got, ops.linear(near, packed))


@every_isa
def test_a_product_does_not_depend_on_the_rows_beside_it(isa: str) -> None:
    """Else a request's tokens would depend on the batch."""
    ops, weight = library(isa), random(130, 576, dtype=torch.bfloat16)
    packed, x = ops.pack_linear(weight), random(70, 576, dtype=torch.bfloat16)
    alone = torch.cat([ops.linear(row[None], packed) for row in x])
    for rows in (2, 8, 33, 70):
        assert torch.equal(ops.linear(x[:rows], packed), alone[:rows])


def test_what_the_kernels_cannot_take_runs_on_the_reference() -> None:
    ops = library(ISAS[0])
    x, weight = random(3, 7, dtype=torch.bfloat16), random(5, 7, dtype=torch.bfloat16)
    assert torch.equal(ops.linear(x, ops.pack_linear(weight)), REFERENCE.linear(x, weight))
    half, weight = random(3, 8, dtype=torch.float16), random(8, dtype=torch.float16)
    assert torch.equal(ops.rms_norm(half, weight, 1e-5), REFERENCE.rms_norm(half, weight, 1e-5))
    assert torch.equal(ops.silu_and_mul(half), REFERENCE.silu_and_mul(half))


@every_isa
@every_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_size", "rotary"), [(64, 64), (80, 32), (96, 96), (128, 128), (6, 6)]
)
def test_rotary_embedding(
    isa: str, dtype: torch.dtype, interleaved: bool, head_size: int, rotary: int
) -> None:
    for tokens in (0, 1, 7):
        qkv = random(tokens, 8 * head_size, dtype=dtype)
        q = qkv[:, : 6 * head_size].unflatten(1, (6, head_size))
        k = qkv[:, 6 * head_size :].unflatten(1, (2, head_size))
        positions = torch.arange(tokens) * 3
        cos_sin = random(64, rotary)
        want = REFERENCE.rotary_embedding(positions, q.float(), k.float(), cos_sin, interleaved)
        got = library(isa).rotary_embedding(positions, q, k, cos_sin, interleaved)
        for mine, theirs in zip(got, want, strict=True):
            close(mine, theirs)


@every_isa
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_write_kv_touches_the_slots_it_is_told_and_no_other(isa: str, dtype: torch.dtype) -> None:
    k, v = random(5, 3, 10, dtype=dtype), random(5, 3, 10, dtype=dtype, seed=1)
    slots = torch.tensor([7, -1, 0, 12, 9])
    keys, values = (random(4, 3, 4, 10, dtype=dtype, seed=s) for s in (2, 3))
    want_keys, want_values = keys.clone(), values.clone()
    library(isa).write_kv(k, v, keys, values, slots)
    REFERENCE.write_kv(k, v, want_keys, want_values, slots)
    assert torch.equal(keys, want_keys)
    assert torch.equal(values, want_values)


@every_isa
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000, 49152])
def test_greedy_sample_takes_the_first_of_the_largest(isa: str, vocab: int) -> None:
    for rows in (0, 1, 3):
        logits = random(rows, vocab).round()  # many ties
        assert torch.equal(library(isa).greedy_sample(logits), REFERENCE.greedy_sample(logits))
    logits = random(3, vocab)
    logits[0, vocab // 2], logits[1, -1] = float("nan"), float("inf")
    masked = torch.full((1, vocab), -float("inf"))
    masked[0, -1] = -3.0
    for ops in (library(isa), REFERENCE):
        assert ops.greedy_sample(logits)[:2].tolist() == [-1, -1]
        assert ops.greedy_sample(masked).tolist() == [vocab - 1]
    view = random(4, vocab + 3)[:, :vocab]
    assert torch.equal(library(isa).greedy_sample(view), REFERENCE.greedy_sample(view))


@every_isa
@pytest.mark.parametrize("vocab", [1, 3, 97, 2048, 49152])
def test_top_k_top_p_sample(isa: str, vocab: int) -> None:
    ops = library(isa)
    for case in sampling_cases(vocab):
        got = ops.top_k_top_p_sample(case.logits.clone(), *case.settings)
        # a draw that falls on the border of two tokens may round to either
        assert (got != case.want).float().mean() <= 0.05
        assert case.kept.gather(1, got[:, None]).all()


class SamplingCase(NamedTuple):
    logits: Tensor
    settings: tuple[Tensor, Tensor, Tensor, Tensor]
    want: Tensor
    kept: Tensor
    """[rows, vocab]: what may be drawn."""


@functools.cache
def sampling_cases(vocab: int) -> list[SamplingCase]:
    """Every mix of settings, with the reference's draws: sorting them is the slow part."""
    rows = 64
    generator = torch.Generator().manual_seed(vocab)
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    uniform = torch.rand(rows, generator=generator)
    full = torch.full((rows,), vocab)
    one, zero = torch.ones(rows), torch.zeros(rows)
    cases = []
    for top_k in (full, full.clamp(max=1), full.clamp(max=5), full.clamp(max=300)):
        ranked = _ranked(logits, top_k)
        for top_p in (one, 0.9 * one, 0.3 * one, 1e-6 * one):
            for min_p in (zero, 0.05 * one, one):
                settings = (top_k, top_p, min_p, uniform)
                want = REFERENCE.top_k_top_p_sample(logits.clone(), *settings)
                cases.append(SamplingCase(logits, settings, want, _kept(*ranked, top_p, min_p)))
    return cases


def _ranked(logits: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """-> (probabilities within the top k, the mass of the likelier tokens), both [rows, vocab]."""
    least = logits.sort(-1, descending=True).values.gather(1, (top_k - 1)[:, None])
    within = torch.where(logits >= least, logits.double().softmax(-1), 0.0)
    within /= within.sum(-1, keepdim=True)
    falling, order = within.sort(-1, descending=True)
    before = torch.empty_like(within).scatter_(1, order, falling.cumsum(-1) - falling)
    return within, before


def _kept(within: Tensor, before: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[rows, vocab]: what may be drawn, with a hair of slack at the borders."""
    most = within.max(-1, keepdim=True).values
    keep = (within > 0) & ((before < top_p[:, None] + 1e-5) | (within == most))
    return keep & (within >= min_p[:, None] * most - 1e-6)


@every_isa
def test_draws_follow_the_distribution(isa: str) -> None:
    """20,000 draws at uniforms on a grid: counts equal the probabilities to a grid step."""
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    draws = 20_000
    rows = logits.expand(draws, 4).contiguous()
    uniform = (torch.arange(draws) + 0.5) / draws
    full = torch.full((draws,), 4)
    got = library(isa).top_k_top_p_sample(
        rows, full, torch.ones(draws), torch.zeros(draws), uniform
    )
    counts = torch.bincount(got, minlength=4) / draws
    assert (counts - logits.exp()).abs().max() < 3e-4
