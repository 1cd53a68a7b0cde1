"""Products with quantised weights: the same numbers on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.components.ops.libraries import DTYPES, ISAS, REFERENCE, library, random
from torch import Tensor

from vllm_di.components.quantized import QuantizedWeight, by_channel, by_group

KINDS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "int8": by_channel,
    "group8": lambda w: by_group(w, 8),
    "group4": lambda w: by_group(w, 4),
}
every_isa = pytest.mark.parametrize("isa", ISAS)


def as_bytes(x: Tensor, part: int) -> Tensor:
    """x as the kernels round it: signed bytes, one scale for ``part`` inputs."""
    pieces = x.float().view(len(x), x.shape[1] // part, part)
    scale = pieces.abs().amax(-1, keepdim=True) / 127
    q = torch.where(scale > 0, pieces * (1 / scale), 0.0).round()
    return (q * scale).view(x.shape)


@every_isa
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 40])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(32, 1), (64, 16), (96, 33), (576, 130), (4096, 33)]
)
def test_products(
    isa: str, kind: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int
) -> None:
    """Equal to fp32 arithmetic on the rounded activations, to 1e-5 of what was summed (2 roundings
    of 8 bits in bf16). Tiles multiply groups in bf16."""
    weight = KINDS[kind](random(outputs, inputs))
    x = random(rows, inputs, dtype=dtype, seed=3)
    part = inputs if kind == "int8" else 32
    ops, dense = library(isa), weight.dequantize(torch.float32)
    if ops.has_tiles and kind != "int8":
        exact = x.bfloat16().float() @ dense.bfloat16().float().T
    else:
        exact = as_bytes(x, part) @ dense.T
    packed = ops.pack_quantized(weight)
    assert packed is not weight
    for bias in (None, random(outputs, dtype=dtype, seed=4)):
        want = exact if bias is None else exact + bias.float()
        got = ops.quantized_linear(x, packed, bias)
        wide = ops.quantized_linear(x, packed, bias, torch.float32)
        assert (got.dtype, wide.dtype) == (dtype, torch.float32)
        assert ((wide - want).abs() <= 2e-5 * (want.abs() + inputs**0.5)).all()
        bound = 2e-5 if dtype is torch.float32 else 2**-7
        assert ((got.float() - want).abs() <= bound * (want.abs() + inputs**0.5)).all()


@every_isa
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(isa: str, kind: str) -> None:
    ops = library(isa)
    packed = ops.pack_quantized(KINDS[kind](random(70, 128)))
    x = random(40, 128, dtype=torch.bfloat16)
    alone = torch.cat([ops.quantized_linear(row[None], packed) for row in x])
    for rows in (2, 5, 8, 40):
        assert torch.equal(ops.quantized_linear(x[:rows], packed), alone[:rows])


@every_isa
@pytest.mark.parametrize("kind", KINDS)
def test_strides_zeros_and_what_is_not_finite(isa: str, kind: str) -> None:
    ops = library(isa)
    weight = KINDS[kind](random(20, 64))
    packed = ops.pack_quantized(weight)
    wide = random(5, 80)
    view = wide[:, :64]
    assert torch.equal(
        ops.quantized_linear(view, packed), ops.quantized_linear(view.contiguous(), packed)
    )
    assert not ops.quantized_linear(torch.zeros(2, 64), packed).any()
    for strange in (float("nan"), float("inf")):
        x = random(3, 64)
        x[1, 40] = strange
        got = ops.quantized_linear(x, packed)
        assert not torch.isfinite(got[1]).any()
        assert torch.isfinite(got[[0, 2]]).all()


def test_what_the_kernel_cannot_take_runs_on_the_reference() -> None:
    ops = library(ISAS[0])
    weight = by_channel(random(5, 33))
    assert ops.pack_quantized(weight) is weight
    x = random(3, 33)
    assert torch.equal(ops.quantized_linear(x, weight), REFERENCE.quantized_linear(x, weight))


class TestWeights:
    def test_rounding_stays_within_half_a_step(self) -> None:
        weight = random(9, 96)
        for made in (by_channel(weight), by_group(weight, 4), by_group(weight, 8)):
            error = (made.dequantize(torch.float32) - weight).abs()
            step = made.scale.float().repeat_interleave(made.group, 1)
            assert (error <= 0.51 * step + 2e-3).all()

    def test_a_row_of_zeros_stays_zero(self) -> None:
        for made in (by_channel(torch.zeros(2, 32)), by_group(torch.zeros(2, 32), 4)):
            assert not made.dequantize(torch.float32).any()

    def test_parts(self) -> None:
        weight = by_group(random(8, 96), 4)
        whole = weight.dequantize(torch.float32)
        order = torch.tensor([3, 1])
        assert torch.equal(weight.rows(order).dequantize(torch.float32), whole[order])
        cut = weight.columns(slice(32, 96))
        assert torch.equal(cut.dequantize(torch.float32), whole[:, 32:])
        with pytest.raises(ValueError, match="cut a group of 32"):
            weight.columns(slice(16, 96))
        other = by_group(random(4, 96, seed=9), 8)
        both = QuantizedWeight.join([weight, other])
        assert both.bits == 8
        assert torch.equal(both.dequantize(torch.float32)[:8], whole)
        with pytest.raises(ValueError, match="33 inputs are no multiple"):
            by_group(random(2, 33), 4)
