"""Causal attention over block tables: one kernel for prefill, chunks of prefill and decode.

A program takes a block of queries of one sequence, for all query heads that share one kv head:
they are the rows of one tile, so that a decode step has a matrix product too. Long contexts are
cut into splits, each a program of its own; their partial results are merged by a second kernel.
Nothing is asked of the host: grids follow from shapes alone, and a program finds its sequence by
bisection. Scores are kept in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """By an exponential; near zero, where that would cancel, by its series."""
    return tl.where(tl.abs(x) < 0.04, x - x * x * x / 3.0, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit(do_not_specialize=["num_seqs"])
def attention_kernel(
    out_ptr,  # [tokens, heads, HEAD_SIZE]
    partial_ptr,  # [tokens, heads, SPLITS, HEAD_SIZE] fp32: sums not yet divided
    stats_ptr,  # [tokens, heads, SPLITS, 2] fp32: largest score, sum of weights
    q_ptr,  # [tokens, heads, HEAD_SIZE]
    key_ptr,  # [blocks, kv_heads, PAGE, HEAD_SIZE]
    value_ptr,
    start_ptr,  # [num_seqs + 1] int32
    length_ptr,  # [num_seqs] int32
    table_ptr,  # [num_seqs, columns] int32
    scale,
    soft_cap,
    window,
    num_seqs,
    num_heads,
    q_stride,
    q_head_stride,
    key_block_stride,
    key_head_stride,
    key_row_stride,
    value_block_stride,
    value_head_stride,
    value_row_stride,
    table_stride,
    HEAD_SIZE: tl.constexpr,
    SIZE: tl.constexpr,  # HEAD_SIZE rounded up to a power of two
    GROUP: tl.constexpr,  # query heads of a kv head
    PAGE: tl.constexpr,  # tokens of a block
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,  # whether there is one
    SOFT_CAP: tl.constexpr,
    UPCAST: tl.constexpr,  # products in fp32, exactly
):
    QUERIES: tl.constexpr = ROWS // GROUP
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)

    # the last sequence whose first block is not behind this one
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(start_ptr + middle) // QUERIES + middle <= block:
            low = middle + 1
        else:
            high = middle
    seq = low - 1
    start = tl.load(start_ptr + seq)
    num_queries = tl.load(start_ptr + seq + 1) - start
    first = (block - (start // QUERIES + seq)) * QUERIES
    if first >= num_queries:
        return
    length = tl.load(length_ptr + seq)
    context = length - num_queries  # tokens before this step's

    row = tl.arange(0, ROWS)
    query = first + row // GROUP
    is_row = (row < QUERIES * GROUP) & (query < num_queries)
    position = context + query
    token = (start + query).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    column = tl.arange(0, SIZE)
    is_column = column < HEAD_SIZE
    q_place = token * q_stride + head * q_head_stride
    q = tl.load(
        q_ptr + q_place[:, None] + column[None, :],
        mask=is_row[:, None] & is_column[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)

    # the columns that this program sees
    begin = 0
    end = tl.minimum(length, context + tl.minimum(first + QUERIES, num_queries))
    if WINDOW:
        begin = tl.maximum(0, context + first - window + 1) // COLUMNS * COLUMNS
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - begin, COLUMNS), SPLITS) * COLUMNS
        begin += split * share
        end = tl.minimum(end, begin + share)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, SIZE], tl.float32)
    table_ptr += tl.cast(seq, tl.int64) * table_stride
    key_ptr += kv_head.to(tl.int64) * key_head_stride
    value_ptr += kv_head.to(tl.int64) * value_head_stride
    for at in range(begin, end, COLUMNS):
        place = at + tl.arange(0, COLUMNS)
        is_place = place < end
        page = tl.load(table_ptr + place // PAGE, mask=is_place, other=0).to(tl.int64)
        inside = place % PAGE
        mask = is_place[:, None] & is_column[None, :]
        key_place = page * key_block_stride + inside * key_row_stride
        keys = tl.load(key_ptr + key_place[:, None] + column[None, :], mask=mask, other=0.0)
        keys = keys.to(q.dtype)
        if UPCAST:
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(keys))
        if SOFT_CAP:
            scores = tanh(scores * (scale / soft_cap)) * (soft_cap * 1.4426950408889634)
        else:
            scores *= scale * 1.4426950408889634
        seen = is_place[None, :] & (place[None, :] <= position[:, None])
        if WINDOW:
            seen &= place[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, 1))
        finite = tl.where(peak == float("-inf"), 0.0, peak)  # nothing seen yet
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(best - finite)
        total = total * shrink + tl.sum(weights, 1)
        value_place = page * value_block_stride + inside * value_row_stride
        values = tl.load(value_ptr + value_place[:, None] + column[None, :], mask=mask, other=0.0)
        values = values.to(q.dtype)
        mixed = mixed * shrink[:, None]
        if UPCAST:
            mixed = tl.dot(weights, values, mixed, input_precision="ieee")
        else:
            mixed = tl.dot(weights.to(q.dtype), values, mixed)
        best = peak

    mask = is_row[:, None] & is_column[None, :]
    out_row = token * num_heads + head
    if SPLITS == 1:
        divisor = tl.where(total == 0.0, 1.0, total)  # a padding row sees nothing
        out = (mixed / divisor[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_row[:, None] * HEAD_SIZE + column[None, :], out, mask=mask)
    else:
        out_row = out_row * SPLITS + split
        tl.store(stats_ptr + out_row * 2, best, mask=is_row)
        tl.store(stats_ptr + out_row * 2 + 1, total, mask=is_row)
        tl.store(
            partial_ptr + out_row[:, None] * HEAD_SIZE + column[None, :],
            mixed,
            mask=mask & (best > float("-inf"))[:, None],
        )


@triton.jit(do_not_specialize=["num_seqs"])
def merge_kernel(
    out_ptr,  # [tokens, heads, HEAD_SIZE]
    partial_ptr,  # as in attention_kernel
    stats_ptr,
    start_ptr,  # [num_seqs + 1] int32
    num_seqs,
    HEAD_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid [tokens, heads]. Rows that belong to no sequence become zero."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    is_token = tl.zeros_like(split) + token < tl.load(start_ptr + num_seqs)
    split = row * SPLITS + split
    column = tl.arange(0, SIZE)
    best = tl.load(stats_ptr + split * 2, mask=is_token, other=float("-inf"))
    total = tl.load(stats_ptr + split * 2 + 1, mask=is_token, other=0.0)
    peak = tl.max(best, 0)
    weights = tl.exp2(best - tl.where(peak == float("-inf"), 0.0, peak))
    mask = (best > float("-inf"))[:, None] & (column < HEAD_SIZE)[None, :]
    mixed = tl.load(partial_ptr + split[:, None] * HEAD_SIZE + column[None, :], mask, other=0.0)
    total = tl.sum(weights * total, 0)
    out = tl.sum(weights[:, None] * mixed, 0) / tl.where(total == 0.0, 1.0, total)
    place = out_ptr + row * HEAD_SIZE + column
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=column < HEAD_SIZE)
