"""Integers that are packed into 32-bit words, taken apart.

Layouts: AutoAWQ's ``WQLinear_GEMM``; AutoGPTQ's ``QuantLinear`` (GPTQModel calls its zero points
``gptq`` and, without the offset of one, ``gptq_v2``); ``pack-quantized`` of compressed-tensors.

A function takes the tensors of one linear layer, by the last part of their names. It raises
ValueError naming the tensor whose shape, dtype or values do not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_di.components.loader.scheme import Scheme
from vllm_di.components.quantized import GROUP, ZERO, QuantizedWeight

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where outputs 0 to 7 of a word lie in it; AutoAWQ writes them in the order 0 2 4 6 1 3 5 7."""


@dataclass(slots=True)
class Unpacked:
    """weight = scale * (q - zero), exactly as the checkpoint has it."""

    q: Tensor  # [out, in] uint8
    scale: Tensor  # [out, groups] fp32
    zero: Tensor  # [out, groups] fp32
    group_of: Tensor  # [in] int64: the group of each input
    bits: int

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out, in], computed in fp32."""
        wide = self.q.float().sub_(self.zero[:, self.group_of])
        return wide.mul_(self.scale[:, self.group_of]).to(dtype)

    def keep(self) -> QuantizedWeight:
        """In the form that kernels multiply: one scale a row, or groups of 32, each with the scale
        of the larger group that it is part of; with act-order the inputs of a group side by side,
        and their order beside them. Exact; a kernel may round scale and offset to fp16. Raises
        ValueError saying why there is no such form."""
        inputs = self.q.shape[1]
        if inputs % GROUP:
            raise ValueError(f"its {inputs} inputs are no multiple of {GROUP}")
        if self.bits == 8 and self.scale.shape[1] == 1 and bool((self.zero == ZERO).all()):
            return QuantizedWeight(self.q, self.scale, -ZERO * self.scale, 8)
        q, order = self.q, None
        groups = _by_runs(self.group_of)
        if groups is None:
            order = self.group_of.argsort(stable=True)
            groups, q = _by_runs(self.group_of[order]), q[:, order]
        if groups is None:
            raise ValueError(f"its groups are no multiples of {GROUP} inputs")
        offset = -self.zero * self.scale
        error = (self.scale.half().float() - self.scale).abs().amax()
        if bool(offset.half().isinf().any()) or bool(error > self.scale.abs().amax() * 2**-10):
            raise ValueError("its scales are beyond the range of fp16")
        return QuantizedWeight(q, self.scale[:, groups], offset[:, groups], self.bits, order)


def _by_runs(group_of: Tensor) -> Tensor | None:
    """[in] -> the group of each 32 inputs side by side; None where they are of several."""
    runs = group_of.view(-1, GROUP)
    return runs[:, 0] if bool((runs == runs[:, :1]).all()) else None


def awq(scheme: Scheme, parts: Mapping[str, Tensor]) -> Unpacked:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""
    words(parts, "qweight", "qzeros")
    inputs, outputs = parts["qweight"].shape[0], 8 * parts["qweight"].shape[1]
    groups = num_groups(scheme, inputs)
    shape(parts, "qzeros", groups, outputs // 8)
    shape(parts, "scales", groups, outputs)
    scale = floats(parts, "scales").t().contiguous()
    q, zero = (_in_order(_last(parts[name], 4)) for name in ("qweight", "qzeros"))
    return Unpacked(q.t().contiguous(), scale, zero.t().float(), group_of(scheme, parts, inputs), 4)


def gptq(scheme: Scheme, parts: Mapping[str, Tensor]) -> Unpacked:
    """qweight [in * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out], g_idx
    [in], where it is there."""
    words(parts, "qweight", "qzeros")
    count = 32 // scheme.bits
    inputs, outputs = count * parts["qweight"].shape[0], parts["qweight"].shape[1]
    groups = num_groups(scheme, inputs)
    shape(parts, "qzeros", groups, -(-outputs // count))
    shape(parts, "scales", groups, outputs)
    scale = floats(parts, "scales").t().contiguous()
    q = _last(parts["qweight"].t().contiguous(), scheme.bits)
    stored = _last(parts["qzeros"], scheme.bits)[:, :outputs]
    # a zero point of 0 is stored as all ones by the first format
    zero = (stored + scheme.zero_offset) & (2**scheme.bits - 1)
    order = group_of(scheme, parts, inputs, "g_idx")
    return Unpacked(q, scale, zero.t().float(), order, scheme.bits)


def packed(scheme: Scheme, parts: Mapping[str, Tensor]) -> Unpacked:
    """weight_packed [out, in * bits / 32], weight_scale [out, groups], weight_shape (out, in),
    weight_zero_point [out * bits / 32, groups] unless symmetric, weight_g_idx [in] with act-order.
    Integers are signed, and stored with half their range added."""
    words(parts, "weight_packed")
    shape(parts, "weight_shape", 2)
    count, stored = 32 // scheme.bits, parts["weight_packed"]
    outputs, inputs = (int(size) for size in parts["weight_shape"])
    shape(parts, "weight_packed", outputs, -(-inputs // count))
    q = _last(stored, scheme.bits)[:, :inputs].contiguous()
    scale = rows_scale(scheme, parts, outputs, inputs)
    zero = torch.full_like(scale, 2 ** (scheme.bits - 1))
    if "weight_zero_point" in parts:
        words(parts, "weight_zero_point")
        shape(parts, "weight_zero_point", -(-outputs // count), scale.shape[1])
        points = _last(parts["weight_zero_point"].t().contiguous(), scheme.bits)
        zero = points[:, :outputs].t().float()
    return Unpacked(q, scale, zero, group_of(scheme, parts, inputs, "weight_g_idx"), scheme.bits)


def _last(words: Tensor, bits: int) -> Tensor:
    """[..., n] int32 -> [..., n * 32 / bits] uint8, the lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    return torch.stack([octets & 15, octets >> 4], -1).flatten(-2)


def _in_order(nibbles: Tensor) -> Tensor:
    """AWQ's order within each word to that of the outputs."""
    ordered: Tensor = nibbles.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)]
    return ordered.flatten(-2)


def group_of(scheme: Scheme, parts: Mapping[str, Tensor], inputs: int, index: str = "") -> Tensor:
    """[in] int64, by the tensor ``index`` where it is there."""
    if index in parts:
        shape(parts, index, inputs)
        groups, order = num_groups(scheme, inputs), parts[index].long()
        if not bool(((order >= 0) & (order < groups)).all()):
            raise ValueError(f"{index} names groups beyond the {groups} that there are")
        return order
    size = inputs if scheme.group == -1 else scheme.group
    return torch.arange(inputs, dtype=torch.int64) // size


def num_groups(scheme: Scheme, inputs: int) -> int:
    return 1 if scheme.group == -1 else -(-inputs // scheme.group)


def words(parts: Mapping[str, Tensor], *names: str) -> None:
    for name in names:
        if parts[name].dtype is not torch.int32 or parts[name].dim() != 2:
            tensor = parts[name]
            raise ValueError(
                f"{name} is {list(tensor.shape)} {tensor.dtype}, expected a matrix of int32"
            )


def shape(parts: Mapping[str, Tensor], name: str, *sizes: int) -> None:
    if tuple(parts[name].shape) != sizes:
        raise ValueError(f"{name} has shape {list(parts[name].shape)}, expected {list(sizes)}")


def floats(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor in fp32."""
    tensor = parts[name]
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, expected floats")
    wide = tensor.float()
    if not bool(wide.isfinite().all()):
        raise ValueError(f"{name} holds values that are not finite")
    return wide


def rows_scale(scheme: Scheme, parts: Mapping[str, Tensor], outputs: int, inputs: int) -> Tensor:
    """weight_scale of one value, of one for each row, or of one for each group of a row -> [out,
    groups] fp32."""
    scale, groups = parts["weight_scale"], num_groups(scheme, inputs)
    if groups == 1 and scale.numel() == 1:
        return floats(parts, "weight_scale").reshape(1, 1).repeat(outputs, 1)
    if groups == 1 and scale.dim() == 1:
        shape(parts, "weight_scale", outputs)
        return floats(parts, "weight_scale")[:, None]
    shape(parts, "weight_scale", outputs, groups)
    return floats(parts, "weight_scale")
