"""Weights of 8 bits beside their scales: small floats (fp8), and integers that are not packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_di.components.loader.packed import (
    Unpacked,
    floats,
    group_of,
    rows_scale,
    shape,
)
from vllm_di.components.loader.scheme import Scheme
from vllm_di.components.quantized import QuantizedWeight


@dataclass(slots=True)
class SmallFloats:
    """weight = scale * value."""

    value: Tensor  # [out, in] float8_e4m3fn
    scale: Tensor  # fp32, [out, 1] or [blocks of outputs, blocks of inputs]
    block: tuple[int, int] | None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out, in], computed in fp32."""
        outputs, inputs = self.value.shape
        scale = self.scale
        if self.block is not None:
            scale = scale.repeat_interleave(self.block[0], 0)[:outputs]
            scale = scale.repeat_interleave(self.block[1], 1)[:, :inputs]
        return self.value.float().mul_(scale).to(dtype)

    def keep(self) -> QuantizedWeight:
        """Raises ValueError: the steps of small floats are not even."""
        raise ValueError("no kernel here multiplies small floats")


def fp8(scheme: Scheme, parts: Mapping[str, Tensor]) -> SmallFloats:
    """weight [out, in] float8_e4m3fn; weight_scale of one value, [out] or [out, 1], or blocks."""
    if scheme.block is not None:
        return _blocks(scheme, parts, "weight_scale")
    outputs, inputs = _matrix(parts, torch.float8_e4m3fn)
    return SmallFloats(parts["weight"], rows_scale(scheme, parts, outputs, inputs), None)


def fp8_blocks(scheme: Scheme, parts: Mapping[str, Tensor]) -> SmallFloats:
    """weight [out, in] float8_e4m3fn, weight_scale_inv [blocks of outputs, blocks of inputs]: what
    a weight is multiplied by, in spite of its name."""
    return _blocks(scheme, parts, "weight_scale_inv")


def _blocks(scheme: Scheme, parts: Mapping[str, Tensor], name: str) -> SmallFloats:
    assert scheme.block is not None
    outputs, inputs = _matrix(parts, torch.float8_e4m3fn)
    shape(parts, name, -(-outputs // scheme.block[0]), -(-inputs // scheme.block[1]))
    return SmallFloats(parts["weight"], floats(parts, name), scheme.block)


def int8(scheme: Scheme, parts: Mapping[str, Tensor]) -> Unpacked:
    """weight [out, in] int8, also where only 4 of its bits are used; weight_scale of one value,
    [out], or [out, groups]; weight_zero_point int8, like the scale, unless symmetric."""
    outputs, inputs = _matrix(parts, torch.int8)
    half = 2 ** (scheme.bits - 1)
    least, most = (int(bound) for bound in parts["weight"].aminmax())
    if least < -half or most >= half:
        raise ValueError(f"weight holds {least} to {most}, which are no {scheme.bits} bits")
    q = (parts["weight"].short() + half).to(torch.uint8)
    scale = rows_scale(scheme, parts, outputs, inputs)
    zero = torch.full_like(scale, half)
    if "weight_zero_point" in parts:
        point = parts["weight_zero_point"]
        if point.dtype is not torch.int8 or point.numel() != parts["weight_scale"].numel():
            raise ValueError(
                f"weight_zero_point is {list(point.shape)} {point.dtype}, expected one int8 for "
                "each scale"
            )
        zero += point.float().reshape(-1, scale.shape[1])
    return Unpacked(q, scale, zero, group_of(scheme, parts, inputs), scheme.bits)


def _matrix(parts: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[int, int]:
    weight = parts["weight"]
    if weight.dtype is not dtype or weight.dim() != 2:
        raise ValueError(
            f"weight is {list(weight.shape)} {weight.dtype}, expected a matrix of {dtype}"
        )
    return weight.shape[0], weight.shape[1]
