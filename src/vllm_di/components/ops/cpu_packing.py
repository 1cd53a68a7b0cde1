"""Weights as the C++ GEMMs read them: panels of outputs, step by step along the inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_di.components.quantized import GROUP, ZERO, QuantizedWeight
from vllm_di.kernels.bindings import CpuKernels
from vllm_di.kernels.memory import huge_zeros

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes that the kernels compute in, to their numbers in C++; fp16 goes to the reference."""
PAIR = 32
"""Outputs that are packed side by side: two panels of 16."""


class PackedWeight:
    """A weight [out, in] in panels of outputs, and the plain weight where oneDNN runs large
    batches."""

    __slots__ = ("data", "dtype", "gated", "inputs", "outputs", "plain")

    def __init__(
        self, data: Tensor, outputs: int, inputs: int, plain: Tensor | None, gated: bool
    ) -> None:
        self.data, self.dtype = data, data.dtype
        self.outputs, self.inputs, self.plain, self.gated = outputs, inputs, plain, gated


class PackedBytes(NamedTuple):
    """A quantised weight in panels of outputs."""

    data: Tensor
    scales: Tensor | None  # [outputs, in whole pairs of panels] by channel
    outputs: int
    inputs: int
    bits: int
    """0: by channel, else of a weight in groups."""
    gated: bool


def pack_linear(
    kernels: CpuKernels, weight: Tensor, threads: int, *, plain: bool, gated: bool
) -> Any:
    """A PackedWeight; a weight that the kernel cannot take (fp16, an odd number of bf16 inputs)
    stays as it is. ``gated`` where the outputs allow it."""
    outputs, inputs = weight.shape
    per_word = 4 // weight.element_size()  # pairs of bf16 lie side by side
    if weight.dtype not in TYPES or inputs % per_word:
        return weight
    if weight.stride()[1] != 1 or weight.stride()[0] % per_word:
        weight = weight.contiguous()
    if gated := gated and outputs % PAIR == 0:
        weight, plain = weight[_beside_gates(outputs)], False
    data = huge_zeros((-(-outputs // PAIR) * PAIR * inputs,), weight.dtype)
    kernels.pack_linear(
        weight.data_ptr(),
        data.data_ptr(),
        outputs,
        inputs // per_word,
        weight.stride()[0] // per_word,
        threads,
    )
    return PackedWeight(data, outputs, inputs, weight if plain else None, gated)


def _beside_gates(outputs: int) -> Tensor:
    """Rows reordered so that each 16 gate rows stand beside the 16 rows that they multiply."""
    rows = torch.arange(outputs, dtype=torch.int64)
    return rows.view(2, -1, PAIR // 2).transpose(0, 1).flatten()


def pack_quantized(
    kernels: CpuKernels, weight: QuantizedWeight, threads: int, *, gated: bool
) -> Any:
    """A PackedBytes; a weight that the kernel cannot take (inputs that are no multiple of 32,
    groups of another size) stays as it is. ``gated`` where the outputs allow it."""
    outputs, inputs = weight.shape
    if inputs % GROUP or not (_by_group(weight) or _by_channel(weight)):
        return weight
    if gated := gated and outputs % PAIR == 0:
        weight = weight.rows(_beside_gates(outputs))
    q, scale = weight.q.contiguous(), weight.scale
    padded = -(-outputs // PAIR) * PAIR
    if _by_group(weight):
        size = padded * inputs // GROUP * (GROUP * weight.bits // 8 + 4)
        data = huge_zeros((size,), torch.uint8)
        halves, offsets = scale.half().contiguous(), weight.offset.half().contiguous()
        kernels.pack_groups(
            weight.bits,
            q.data_ptr(),
            halves.data_ptr(),
            offsets.data_ptr(),
            data.data_ptr(),
            outputs,
            inputs,
            threads,
        )
        return PackedBytes(data, None, outputs, inputs, weight.bits, gated)
    data = huge_zeros((padded * inputs,), torch.uint8)
    kernels.pack_channels(q.data_ptr(), data.data_ptr(), outputs, inputs, threads)
    scales = torch.zeros(padded, dtype=torch.float32)  # whatever torch's default is
    scales[:outputs] = scale[:, 0]
    return PackedBytes(data, scales, outputs, inputs, 0, gated)


def _by_group(weight: QuantizedWeight) -> bool:
    return weight.group == GROUP and not _by_channel(weight)


def _by_channel(weight: QuantizedWeight) -> bool:
    if weight.group != weight.shape[1] or weight.scale.dtype is not torch.float32:
        return False
    return torch.equal(weight.offset, -ZERO * weight.scale)
