"""Products of rows with the weights of their experts, without asking the host which are used."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_experts"])
def experts_kernel(
    out_ptr,  # [pairs, num_outputs]
    x_ptr,  # [pairs / PER_ROW, num_inputs]
    weight_ptr,  # [num_experts, num_outputs, num_inputs]
    order_ptr,  # [pairs] int64: pairs of a row and an expert, by expert
    start_ptr,  # [num_experts + 1] int32: the first in ``order`` of each expert
    num_experts,
    num_outputs,
    num_inputs,
    x_stride,
    weight_stride,
    weight_row_stride,
    PER_ROW: tl.constexpr,  # pairs that share a row of x
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,  # products in fp32, exactly
):
    block = tl.program_id(0)

    # the last expert whose first block is not behind this one
    low = 0
    high = num_experts
    while low < high:
        middle = (low + high) // 2
        if tl.load(start_ptr + middle) // ROWS + middle <= block:
            low = middle + 1
        else:
            high = middle
    expert = low - 1
    start = tl.load(start_ptr + expert)
    num_rows = tl.load(start_ptr + expert + 1) - start
    first = (block - (start // ROWS + expert)) * ROWS
    if first >= num_rows:
        return

    row = first + tl.arange(0, ROWS)
    is_row = row < num_rows
    pair = tl.load(order_ptr + start + row, mask=is_row, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_outputs
    depth = tl.arange(0, DEPTH)
    x_rows = x_ptr + (pair // PER_ROW) * x_stride
    weight_rows = weight_ptr + tl.cast(expert, tl.int64) * weight_stride
    weight_rows += column.to(tl.int64) * weight_row_stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, num_inputs, DEPTH):
        inside = at + depth
        is_inside = inside < num_inputs
        x = tl.load(
            x_rows[:, None] + inside[None, :],
            mask=is_row[:, None] & is_inside[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_rows[:, None] + inside[None, :],
            mask=is_column[:, None] & is_inside[None, :],
            other=0.0,
        )
        if UPCAST:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
            total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
        else:
            total = tl.dot(x, tl.trans(weight), total)
    place = pair[:, None] * num_outputs + column[None, :]
    tl.store(
        out_ptr + place,
        total.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )
