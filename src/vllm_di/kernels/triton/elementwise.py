"""Rotary embedding, the MLP's gates, and the write into the KV cache."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_heads(
    out_ptr,  # where the turned heads go: the cache, or where they are
    out_stride,
    x_ptr,  # a token's heads
    stride,
    cos,  # [HALF] fp32
    sin,
    num_heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Turns the pairs of each head."""
    heads = tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    mask = (heads < num_heads)[:, None] & (pair < half)[None, :]
    if INTERLEAVED:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + half
    rows = x_ptr + heads[:, None] * stride
    out_rows = out_ptr + heads[:, None] * out_stride
    a = tl.load(rows + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(rows + second[None, :], mask=mask, other=0.0).to(tl.float32)
    kind = x_ptr.dtype.element_ty  # rounded to it even on the way to a cache of another dtype
    turned_a = (a * cos[None, :] - b * sin[None, :]).to(kind).to(out_ptr.dtype.element_ty)
    turned_b = (b * cos[None, :] + a * sin[None, :]).to(kind).to(out_ptr.dtype.element_ty)
    tl.store(out_rows + first[None, :], turned_a, mask=mask)
    tl.store(out_rows + second[None, :], turned_b, mask=mask)


@triton.jit
def copy_heads(
    out_ptr,
    out_stride,
    x_ptr,  # a token's heads
    stride,
    first,  # element of a head from which on they are copied
    num_heads,
    head_size,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    heads = tl.arange(0, HEADS)
    columns = tl.arange(0, SIZE)
    inside = (columns >= first) & (columns < head_size)
    mask = (heads < num_heads)[:, None] & inside[None, :]
    x = tl.load(x_ptr + heads[:, None] * stride + columns[None, :], mask=mask)
    place = out_ptr + heads[:, None] * out_stride + columns[None, :]
    tl.store(place, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    positions_ptr,  # [tokens] int64
    q_ptr,  # [tokens, num_heads, head_size], turned in place
    k_ptr,  # [tokens, num_kv_heads, head_size], turned in place
    cos_sin_ptr,  # [positions, 2 half] fp32: cosines, then sines
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    num_heads,
    num_kv_heads,
    half,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    row = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * half)
    cos = tl.load(row + pair, mask=pair < half, other=0.0)
    sin = tl.load(row + half + pair, mask=pair < half, other=0.0)
    q_ptr += token * q_stride
    k_ptr += token * k_stride
    rotate_heads(
        *(q_ptr, q_head_stride, q_ptr, q_head_stride),
        *(cos, sin, num_heads, half, HEADS, HALF, INTERLEAVED),
    )
    rotate_heads(
        *(k_ptr, k_head_stride, k_ptr, k_head_stride),
        *(cos, sin, num_kv_heads, half, KV_HEADS, HALF, INTERLEAVED),
    )


@triton.jit
def gate_kernel(
    out_ptr,  # [rows, size], contiguous
    x_ptr,  # [rows, 2 size]
    x_stride,
    size,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    x_ptr += row * x_stride
    gate = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + size + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU:  # x / 2 (1 + tanh(y)) is x sigmoid(2 y)
        turn = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        turn = gate
    out = gate / (1.0 + tl.exp(-turn)) * up
    tl.store(out_ptr + row * size + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_kv_kernel(
    k_ptr,  # [tokens, num_kv_heads, head_size]
    v_ptr,
    key_ptr,  # [blocks, num_kv_heads, block_size, head_size]
    value_ptr,
    slots_ptr,  # [tokens] int64
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    block_stride,  # of both caches
    head_stride,
    row_stride,
    block_size,
    num_kv_heads,
    head_size,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    place = (slot // block_size) * block_stride + (slot % block_size) * row_stride
    copy_heads(
        *(key_ptr + place, head_stride, k_ptr + token * k_stride, k_head_stride),
        *(0, num_kv_heads, head_size, HEADS, SIZE),
    )
    copy_heads(
        *(value_ptr + place, head_stride, v_ptr + token * v_stride, v_head_stride),
        *(0, num_kv_heads, head_size, HEADS, SIZE),
    )


@triton.jit
def rotary_write_kv_kernel(
    positions_ptr,  # [tokens] int64
    q_ptr,  # [tokens, num_heads, head_size], turned in place
    k_ptr,  # [tokens, num_kv_heads, head_size]
    v_ptr,
    cos_sin_ptr,  # [positions, 2 half] fp32: cosines, then sines
    key_ptr,  # [blocks, num_kv_heads, block_size, head_size]
    value_ptr,
    slots_ptr,  # [tokens] int64
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    block_stride,  # of both caches
    head_stride,
    row_stride,
    block_size,
    num_heads,
    num_kv_heads,
    head_size,
    half,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    row = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * half)
    cos = tl.load(row + pair, mask=pair < half, other=0.0)
    sin = tl.load(row + half + pair, mask=pair < half, other=0.0)
    q_ptr += token * q_stride
    rotate_heads(
        *(q_ptr, q_head_stride, q_ptr, q_head_stride),
        *(cos, sin, num_heads, half, HEADS, HALF, INTERLEAVED),
    )
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    place = (slot // block_size) * block_stride + (slot % block_size) * row_stride
    key_ptr += place
    k_ptr += token * k_stride
    rotate_heads(
        *(key_ptr, head_stride, k_ptr, k_head_stride),
        *(cos, sin, num_kv_heads, half, KV_HEADS, HALF, INTERLEAVED),
    )
    copy_heads(  # what no pair of a head holds
        *(key_ptr, head_stride, k_ptr, k_head_stride),
        *(2 * half, num_kv_heads, head_size, KV_HEADS, SIZE),
    )
    copy_heads(
        *(value_ptr + place, head_stride, v_ptr + token * v_stride, v_head_stride),
        *(0, num_kv_heads, head_size, KV_HEADS, SIZE),
    )
