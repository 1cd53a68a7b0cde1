"""Products of matrices by torch, for every part that leaves them to torch.

A part calls these instead of torch's own: on CPUs with AMX, oneDNN's product of a narrow view reads
what lies in the gaps between its rows, and a NaN or an infinity there spoils the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
"""What oneDNN multiplies in AMX's tiles. The fault was seen in bf16; fp16 takes the same way."""


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy where it is a narrow matrix, or several, with gaps between rows."""
    if x.dtype not in NARROW or x.is_contiguous() or (x.dim() > 1 and x.mT.is_contiguous()):
        return x
    return x.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out]."""
    return F.linear(dense(x), dense(weight), bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., n, k], b [..., k, m] -> [..., n, m]."""
    return torch.matmul(dense(a), dense(b))


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """As torch.einsum."""
    return torch.einsum(equation, *map(dense, operands))


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in], weight [out, in] -> [rows, out] fp32, never rounded on the way. torch has it
    for accelerators alone."""
    return torch.mm(dense(x), dense(weight).t(), out_dtype=torch.float32)


def attention(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, *, grouped: bool
) -> Tensor:
    """q [..., heads, queries, head_size], keys and values [..., kv_heads, length, head_size], seen
    [queries, length] bool -> as q. ``grouped``: there are fewer kv_heads than heads."""
    return F.scaled_dot_product_attention(
        dense(q), dense(keys), dense(values), attn_mask=seen, scale=scale, enable_gqa=grouped
    )
