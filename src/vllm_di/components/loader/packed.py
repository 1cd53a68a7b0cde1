"""Integers that AWQ and GPTQ pack into 32-bit words, taken apart.

Layouts: AutoAWQ's ``WQLinear_GEMM`` and AutoGPTQ's ``QuantLinear`` (GPTQModel calls its zero points
``gptq`` and, without the offset of one, ``gptq_v2``).
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
        of the larger group that it is part of. Exact; a kernel may round scale and offset to
        fp16. Raises ValueError saying why there is no such form."""
        inputs = self.q.shape[1]
        if inputs % GROUP:
            raise ValueError(f"its {inputs} inputs are no multiple of {GROUP}")
        if self.bits == 8 and self.scale.shape[1] == 1 and bool((self.zero == ZERO).all()):
            return QuantizedWeight(self.q, self.scale, -ZERO * self.scale, 8)
        runs = self.group_of.view(-1, GROUP)
        groups = runs[:, 0]
        if not torch.equal(runs, groups[:, None].expand_as(runs)):
            raise ValueError(f"{GROUP} inputs side by side are not of one group (act-order?)")
        offset = -self.zero * self.scale
        error = (self.scale.half().float() - self.scale).abs().amax()
        if bool(offset.half().isinf().any()) or bool(error > self.scale.abs().amax() * 2**-10):
            raise ValueError("its scales are beyond the range of fp16")
        return QuantizedWeight(self.q, self.scale[:, groups], offset[:, groups], self.bits)


def unpack(scheme: Scheme, parts: Mapping[str, Tensor]) -> Unpacked:
    """The tensors of one linear layer, by the last part of their names. Raises ValueError naming
    the tensor whose shape, dtype or values do not fit."""
    return UNPACK[scheme.method](scheme, parts)


def _awq(scheme: Scheme, parts: Mapping[str, Tensor]) -> Unpacked:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""
    _words(parts, "qweight", "qzeros")
    inputs, outputs = parts["qweight"].shape[0], 8 * parts["qweight"].shape[1]
    groups = _groups(scheme, inputs)
    _shape(parts, "qzeros", groups, outputs // 8)
    scale = _scale(parts, "scales", groups, outputs)
    q, zero = (_in_order(_last(parts[name], 4)) for name in ("qweight", "qzeros"))
    return Unpacked(q.t().contiguous(), scale, zero.t().float(), _even(scheme, inputs), 4)


def _gptq(scheme: Scheme, parts: Mapping[str, Tensor]) -> Unpacked:
    """qweight [in * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out], g_idx
    [in], where it is there."""
    _words(parts, "qweight", "qzeros")
    count = 32 // scheme.bits
    inputs, outputs = count * parts["qweight"].shape[0], parts["qweight"].shape[1]
    groups = _groups(scheme, inputs)
    _shape(parts, "qzeros", groups, -(-outputs // count))
    scale = _scale(parts, "scales", groups, outputs)
    q = _last(parts["qweight"].t().contiguous(), scheme.bits)
    stored = _last(parts["qzeros"], scheme.bits)[:, :outputs]
    # a zero point of 0 is stored as all ones by the first format
    zero = (stored + scheme.zero_offset) & (2**scheme.bits - 1)
    group_of = _even(scheme, inputs)
    if "g_idx" in parts:
        _shape(parts, "g_idx", inputs)
        group_of = parts["g_idx"].long()
        if not bool(((group_of >= 0) & (group_of < groups)).all()):
            raise ValueError(f"g_idx names groups beyond the {groups} that there are")
    return Unpacked(q, scale, zero.t().float(), group_of, scheme.bits)


UNPACK = {"awq": _awq, "gptq": _gptq}


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


def _even(scheme: Scheme, inputs: int) -> Tensor:
    size = inputs if scheme.group == -1 else scheme.group
    return torch.arange(inputs, dtype=torch.int64) // size


def _groups(scheme: Scheme, inputs: int) -> int:
    return 1 if scheme.group == -1 else -(-inputs // scheme.group)


def _words(parts: Mapping[str, Tensor], *names: str) -> None:
    for name in names:
        if parts[name].dtype is not torch.int32 or parts[name].dim() != 2:
            tensor = parts[name]
            raise ValueError(
                f"{name} is {list(tensor.shape)} {tensor.dtype}, expected a matrix of int32"
            )


def _shape(parts: Mapping[str, Tensor], name: str, *shape: int) -> None:
    if tuple(parts[name].shape) != shape:
        raise ValueError(f"{name} has shape {list(parts[name].shape)}, expected {list(shape)}")


def _scale(parts: Mapping[str, Tensor], name: str, groups: int, outputs: int) -> Tensor:
    """[groups, out] floats -> [out, groups] fp32."""
    _shape(parts, name, groups, outputs)
    scale = parts[name]
    if not scale.is_floating_point():
        raise ValueError(f"{name} is {scale.dtype}, expected floats")
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{name} holds values that are not finite")
    return scale.t().float().contiguous()
