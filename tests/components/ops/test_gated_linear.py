"""A product with the MLP's gate behind it: the numbers of both one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.components.ops.libraries import DTYPES, ISAS, REFERENCE, library, random

from vllm_di.components.interfaces import Activation
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.components.quantization.rounded import RoundedWeights

every_isa = pytest.mark.parametrize("isa", ISAS)
every_activation = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
OUTPUTS = [32, 96, 320, 34, 6]  # the last two are no whole pairs of panels: product and gate apart


@every_isa
@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 40, 200])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_gated_linear(
    isa: str, activation: Activation, dtype: torch.dtype, rows: int, outputs: int
) -> None:
    """To 2e-5 in fp32 of what was summed, three roundings of 8 bits in bf16."""
    ops, inputs = library(isa), 64
    weight = random(outputs, inputs, dtype=dtype) / inputs**0.5
    x = random(rows, inputs, dtype=dtype, seed=3)
    packed = ops.pack_gated_linear(weight)
    assert packed.gated == (outputs % 32 == 0)
    bound = 2e-5 if dtype is torch.float32 else 3 * 2**-8
    for bias in (None, random(outputs, dtype=dtype, seed=4)):
        wide = None if bias is None else bias.float()
        want = REFERENCE.gated_linear(x.float(), weight.float(), wide, activation)
        size = REFERENCE.linear(x.float(), weight.float(), wide).abs() + 1
        scale = size[:, : outputs // 2] * size[:, outputs // 2 :]  # of the two that are multiplied
        got = ops.gated_linear(x, packed, bias, activation)
        assert (got.dtype, got.shape) == (dtype, want.shape)
        assert ((got.float() - want).abs() <= bound * scale).all()


@every_isa
@every_activation
@pytest.mark.parametrize("kind", ["int8", "group8", "group4"])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_gated_quantized_linear_is_the_product_then_the_gate(
    isa: str, activation: Activation, kind: str, outputs: int
) -> None:
    """Products in fp32 are bit-equal with and without the gate; the gate's own bound is 1e-6."""
    ops = library(isa)
    scales: Any = "channel" if kind == "int8" else "group"
    rounded = RoundedWeights(ops, bits=4 if kind == "group4" else 8, scales=scales)
    weight = rounded._rounded(random(outputs, 96))
    plain, gated = ops.pack_quantized(weight), ops.pack_gated_quantized(weight)
    assert gated.gated == (outputs % 32 == 0)
    for rows in (0, 1, 5, 40):
        x, bias = random(rows, 96), random(outputs)
        apart = ops.quantized_linear(x, plain, bias)
        act = REFERENCE.silu_and_mul if activation == "silu" else REFERENCE.gelu_tanh_and_mul
        got = ops.gated_quantized_linear(x, gated, bias, activation)
        torch.testing.assert_close(got, act(apart), rtol=2e-6, atol=1e-5)


@every_isa
def test_a_row_does_not_depend_on_the_rows_beside_it(isa: str) -> None:
    ops = library(isa)
    packed = ops.pack_gated_linear(random(96, 64, dtype=torch.bfloat16))
    x = random(40, 64, dtype=torch.bfloat16)
    alone = torch.cat([ops.gated_linear(row[None], packed, None, "silu") for row in x])
    for rows in (2, 5, 8, 40):
        assert torch.equal(ops.gated_linear(x[:rows], packed, None, "silu"), alone[:rows])


@pytest.mark.parametrize("member", ["linear", "silu_and_mul", "gelu_tanh_and_mul"])
def test_a_member_from_another_library_takes_the_product_and_the_gate_apart(member: str) -> None:
    weight = random(64, 32)
    whole, apart = (
        SelectedOps(library(ISAS[0])),
        SelectedOps(library(ISAS[0]), **{member: TorchOps()}),
    )
    assert NoQuantization(whole).gated_linear(weight, None, "silu") is not None
    assert NoQuantization(apart).gated_linear(weight, None, "silu") is None


@pytest.mark.parametrize("member", ["quantized_linear", "silu_and_mul"])
def test_the_same_with_quantised_weights(member: str) -> None:
    weight = random(64, 32)
    whole, apart = (
        SelectedOps(library(ISAS[0])),
        SelectedOps(library(ISAS[0]), **{member: TorchOps()}),
    )
    for ops, fused in ((whole, True), (apart, False)):
        rounded = RoundedWeights(ops, bits=8, scales="channel")
        assert (rounded.gated_linear(weight, None, "silu") is not None) == fused
