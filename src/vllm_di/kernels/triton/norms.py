"""RMS norms: a program takes a few rows whole, and reduces them in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    out_ptr,  # [num_rows, size], contiguous
    x_ptr,  # [num_rows / inner, inner, size]
    weight_ptr,  # [size]
    num_rows,
    inner,
    x_stride,
    x_inner_stride,
    size,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    start = (rows // inner).to(tl.int64) * x_stride + (rows % inner) * x_inner_stride
    x = tl.load(x_ptr + start[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < size, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / size + eps)
    out = x * scale[:, None] * weight[None, :]
    place = rows.to(tl.int64)[:, None] * size + columns[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_rms_norm_kernel(
    x_ptr,  # [rows, size]; becomes the norm of the sum
    residual_ptr,  # [rows, size]; becomes the sum
    weight_ptr,  # [size]
    x_stride,
    residual_stride,
    size,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    total = x.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + columns, total, mask=mask)
    x = total.to(tl.float32)  # the norm is of the sum as it was stored
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    tl.store(x_ptr + columns, (x * scale * weight).to(x_ptr.dtype.element_ty), mask=mask)
