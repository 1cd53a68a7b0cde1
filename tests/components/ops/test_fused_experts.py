"""A mixture-of-experts MLP on every instruction set: the numbers of the reference."""

from __future__ import annotations

import pytest
import torch
from tests.components.ops.libraries import DTYPES, ISAS, REFERENCE, library
from torch import Tensor

from vllm_di.components.ops.table import SelectedOps
from vllm_di.conformance.checks.test_ops import compare
from vllm_di.conformance.numbers import assert_close
from vllm_di.conformance.op_cases import Maker, cases

HOST = torch.device("cpu")

every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def routed(make: Maker, tokens: int, experts: int, k: int) -> tuple[Tensor, Tensor]:
    shares, ids = make.uniform(tokens, experts).topk(k)
    return shares / shares.sum(-1, keepdim=True), ids


def experts_of(make: Maker, experts: int, hidden: int, inter: int) -> tuple[Tensor, Tensor]:
    gate_up = make.real(experts, 2 * inter, hidden) / hidden**0.5
    return gate_up, make.real(experts, hidden, inter) / inter**0.5


@every_isa
@every_dtype
def test_the_cases_of_the_suite(isa: str, dtype: torch.dtype) -> None:
    ops = SelectedOps(library(isa))
    assert ops.library_of("fused_experts") is library(isa)
    for case in cases("fused_experts", dtype, seed=0):
        compare(ops, "fused_experts", case, HOST)


@every_isa
@every_dtype
@pytest.mark.parametrize(
    ("hidden", "inter"), [(31, 17), (64, 33), (300, 48), (576, 290), (2048, 1024)]
)
def test_pieces_that_are_not_full(isa: str, dtype: torch.dtype, hidden: int, inter: int) -> None:
    """More tokens than a span, more inputs than a packed piece, an odd number of both."""
    make = Maker(dtype, hidden)
    gate_up, down = experts_of(make, 3, hidden, inter)
    for tokens in (1, 9, 230):
        shares, ids = routed(make, tokens, 3, 2)
        x = make.view(tokens, hidden)
        got = library(isa).fused_experts(x, gate_up, down, shares, ids, "silu")
        wide = [t.float() for t in (x, gate_up, down)]
        assert got.dtype is dtype
        exact = REFERENCE.fused_experts(wide[0], wide[1], wide[2], shares, ids, "silu")
        assert_close(got, exact, long=True)


@every_isa
def test_a_token_does_not_depend_on_those_beside_it(isa: str) -> None:
    make = Maker(torch.bfloat16, 0)
    gate_up, down = experts_of(make, 8, 96, 80)
    shares, ids = routed(make, 50, 8, 3)
    x, ops = make.real(50, 96), library(isa)
    whole = ops.fused_experts(x, gate_up, down, shares, ids, "silu")
    for t in range(50):
        row = slice(t, t + 1)
        alone = ops.fused_experts(x[row], gate_up, down, shares[row], ids[row], "silu")
        assert torch.equal(alone, whole[row])


@every_isa
def test_what_is_not_a_number_stays_in_its_token(isa: str) -> None:
    make = Maker(torch.float32, 0)
    gate_up, down = experts_of(make, 4, 64, 40)
    shares, ids = routed(make, 6, 4, 2)
    x = make.real(6, 64)
    x[2, 63] = float("nan")
    ids[4, 1] = 4  # there are experts 0 to 3
    ids[5, 0] = -1
    got = library(isa).fused_experts(x, gate_up, down, shares, ids, "silu")
    assert got.isnan().all(1).tolist() == [False, False, True, False, True, True]
    assert got[[0, 1, 3]].isfinite().all()


def test_what_the_kernel_cannot_take_runs_on_the_reference() -> None:
    make = Maker(torch.float16, 0)
    gate_up, down = experts_of(make, 4, 64, 40)
    shares, ids = routed(make, 6, 4, 2)
    x = make.real(6, 64)
    got = library(ISAS[0]).fused_experts(x, gate_up, down, shares, ids, "gelu_tanh")
    want = REFERENCE.fused_experts(x, gate_up, down, shares, ids, "gelu_tanh")
    assert torch.equal(got, want)
