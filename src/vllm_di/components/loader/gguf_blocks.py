"""llama.cpp's blocks of quantised weights, taken apart into scales, offsets and integers.

Layouts: ggml's ``block_q4_0``, ``block_q4_1``, ``block_q5_0``, ``block_q5_1``, ``block_q8_0`` and
``block_q4_K`` (ggml-common.h).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_di.components.quantized import GROUP, QuantizedWeight

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]
FLOATS = ("F32", "F16", "BF16", "F64")
SUPER = 256
"""Weights of a block of the k-quants."""


def unpack(kind: str, data: Bytes) -> QuantizedWeight | None:
    """data [rows, bytes of a row] -> the same weights. None for a type that has no such form.

    Q4_K's scales, products of two numbers, are rounded to fp16; all else is exact.
    """
    rows = data.shape[0]
    if kind == "Q4_0":  # d, 16 bytes; weight = d (q - 8)
        block = data.reshape(rows, -1, 2 + GROUP // 2)
        d = _halves(block[..., :2])
        return _made(_nibbles(block[..., 2:]), d, -8 * d, 4)
    if kind == "Q4_1":  # d, m, 16 bytes; weight = d q + m
        block = data.reshape(rows, -1, 4 + GROUP // 2)
        return _made(_nibbles(block[..., 4:]), _halves(block[..., :2]), _halves(block[..., 2:4]), 4)
    if kind == "Q5_0":  # d, fifth bits, 16 bytes; weight = d (q - 16)
        block = data.reshape(rows, -1, 6 + GROUP // 2)
        d = _halves(block[..., :2])
        q = _nibbles(block[..., 6:]) | _fifth(block[..., 2:6])
        return _made(q, d, -16 * d, 8)
    if kind == "Q5_1":  # d, m, fifth bits, 16 bytes; weight = d q + m
        block = data.reshape(rows, -1, 8 + GROUP // 2)
        q = _nibbles(block[..., 8:]) | _fifth(block[..., 4:8])
        return _made(q, _halves(block[..., :2]), _halves(block[..., 2:4]), 8)
    if kind == "Q8_0":  # d, 32 signed bytes
        block = data.reshape(rows, -1, 2 + GROUP)
        d = _halves(block[..., :2])
        return _made(block[..., 2:] ^ 128, d, -128 * d, 8)  # signed to offset binary
    if kind == "Q4_K":
        return _q4_k(data.reshape(rows, -1, 4 + 12 + SUPER // 2))
    return None


def _q4_k(block: Bytes) -> QuantizedWeight:
    """d, dmin, eight 6-bit scales and mins, 128 bytes; weight = d scale q - dmin min."""
    rows, count, _ = block.shape
    packed = block[..., 4:16]
    low, high, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (last & 15) | (low >> 6) << 4], -1)
    mins = np.concatenate([high & 63, last >> 4 | (high >> 6) << 4], -1)
    d = _halves(block[..., :2]).astype(np.float32)[..., None]
    least = _halves(block[..., 2:4]).astype(np.float32)[..., None]
    pairs = block[..., 16:].reshape(rows, count, 4, GROUP)  # low halves: a group, high: the next
    q = np.stack([pairs & 15, pairs >> 4], 3).reshape(rows, count * SUPER // GROUP, GROUP)
    scale, offset = (d * scales).astype(np.float16), (-least * mins).astype(np.float16)
    return _made(q, scale.reshape(rows, -1), offset.reshape(rows, -1), 4)


def _halves(pairs: Bytes) -> Halves:
    """[..., 2] bytes -> [...] fp16."""
    return np.ascontiguousarray(pairs).view(np.float16)[..., 0]


def _nibbles(packed: Bytes) -> Bytes:
    """[rows, groups, 16] -> [rows, groups, 32]: low halves first."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _fifth(packed: Bytes) -> Bytes:
    """[rows, groups, 4] -> [rows, groups, 32]: each weight's fifth bit, in place."""
    bits = np.unpackbits(np.ascontiguousarray(packed), axis=-1, bitorder="little")
    return bits << np.uint8(4)


def _made(q: Any, scale: Any, offset: Any, bits: int) -> QuantizedWeight:
    flat, scale, offset = (
        torch.from_numpy(np.ascontiguousarray(array))
        for array in (q.reshape(len(q), -1), scale, offset)
    )
    return QuantizedWeight(flat, scale, offset, bits)
