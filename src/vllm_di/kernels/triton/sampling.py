"""Sampling without a sort: thresholds are found bit by bit.

A float's bits, with the sign folded in, are an integer that grows with it (its *key*). How many
logits, or how much probability, lie at a key or above falls as the key grows, so that the key of
a wanted count or mass is found from its highest bits down, two bits in each pass over the row.
A row stays in the cache between passes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def greedy_kernel(
    out_ptr,  # [rows] int64
    logits_ptr,  # [rows, vocab] fp32
    stride,
    vocab,
    BLOCK: tl.constexpr,
):
    """The largest logit's id, the lowest on a tie; -1 where it is not finite or a NaN is there."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    best = float("-inf")
    best_id = -1
    has_nan = 0
    for at in range(0, vocab, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf"))
        has_nan = tl.maximum(has_nan, tl.max((x != x).to(tl.int32), 0))
        x = tl.where(x != x, float("-inf"), x)
        peak = tl.max(x, 0)
        peak_id = tl.min(tl.where(x == peak, ids, vocab), 0)
        best_id = tl.where(peak > best, peak_id, best_id)
        best = tl.maximum(best, peak)
    is_finite = (has_nan == 0) & (best < float("inf"))
    tl.store(out_ptr + row, tl.where(is_finite, best_id, -1).to(tl.int64))


@triton.jit
def keys_of(x):
    """fp32 -> uint32 in the same order."""
    x = tl.where(x == 0.0, 0.0, x)  # both zeros are equal
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def value_of(key):
    """The inverse of ``keys_of``."""
    bits = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def measure_above(x, keys, threshold, peak, is_id, COUNT: tl.constexpr):
    """Of one block: how many logits have this key or more, or how much they weigh."""
    inside = is_id & (keys >= threshold)
    if COUNT:
        return tl.sum(tl.where(inside, 1.0, 0.0), 0)
    return tl.sum(tl.where(inside, tl.exp(x - peak), 0.0), 0)


@triton.jit
def reaches(amount, wanted, STRICT: tl.constexpr):
    if STRICT:
        return amount > wanted
    return amount >= wanted


@triton.jit
def find_key(
    logits_ptr, vocab, peak, wanted, COUNT: tl.constexpr, STRICT: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key of which it holds that what lies there and above reaches ``wanted`` (goes
    beyond it, when STRICT)."""
    found = tl.cast(0, tl.uint32)
    bit = tl.cast(1 << 30, tl.uint32)
    for _ in range(16):
        one = 0.0
        two = 0.0
        three = 0.0
        for at in range(0, vocab, BLOCK):
            ids = at + tl.arange(0, BLOCK)
            is_id = ids < vocab
            x = tl.load(logits_ptr + ids, mask=is_id, other=float("-inf"))
            keys = keys_of(x)
            one += measure_above(x, keys, found + bit, peak, is_id, COUNT)
            two += measure_above(x, keys, found + bit * 2, peak, is_id, COUNT)
            three += measure_above(x, keys, found + bit * 3, peak, is_id, COUNT)
        digit = reaches(one, wanted, STRICT).to(tl.uint32)
        digit += reaches(two, wanted, STRICT).to(tl.uint32)
        digit += reaches(three, wanted, STRICT).to(tl.uint32)
        found += bit * digit
        bit = bit >> 2
    return found


@triton.jit
def mass_above(logits_ptr, vocab, peak, key, BLOCK: tl.constexpr):
    """-> weight of all logits above a key, number of logits at it."""
    mass = 0.0
    ties = 0.0
    for at in range(0, vocab, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        is_id = ids < vocab
        x = tl.load(logits_ptr + ids, mask=is_id, other=float("-inf"))
        keys = keys_of(x)
        mass += tl.sum(tl.where(is_id & (keys > key), tl.exp(x - peak), 0.0), 0)
        ties += tl.sum(tl.where(is_id & (keys == key), 1.0, 0.0), 0)
    return mass, ties


@triton.jit
def lowest_from(logits_ptr, vocab, key, BLOCK: tl.constexpr):
    """The smallest key of a logit that is ``key`` or more."""
    lowest = tl.cast(0xFFFFFFFF, tl.uint32)
    for at in range(0, vocab, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf"))
        keys = keys_of(x)
        inside = (ids < vocab) & (keys >= key)
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, keys, 0xFFFFFFFF), 0))
    return lowest


@triton.jit
def top_k_top_p_kernel(
    out_ptr,  # [rows] int64
    logits_ptr,  # [rows, vocab] fp32
    top_k_ptr,  # [rows] int64
    top_p_ptr,  # [rows] fp32
    min_p_ptr,
    uniform_ptr,
    stride,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    peak = float("-inf")
    for at in range(0, vocab, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(x, 0))

    # keep all above the key ``least``, and ``kept`` of those equal to it, the lowest ids first
    least = tl.cast(0, tl.uint32)
    if top_k < vocab:
        wanted = tl.maximum(top_k, 1).to(tl.float32)
        least = find_key(logits_ptr, vocab, peak, wanted, True, False, BLOCK)
    mass, kept = mass_above(logits_ptr, vocab, peak, least, BLOCK)
    weight = tl.exp(value_of(least) - peak)
    weight = tl.where(kept > 0.0, weight, 0.0)  # no logit has key 0
    wanted = top_p * (mass + kept * weight)
    if top_p < 1.0:
        found = find_key(logits_ptr, vocab, peak, wanted, False, False, BLOCK)
        if found > least:
            least = found
            mass, kept = mass_above(logits_ptr, vocab, peak, least, BLOCK)
            weight = tl.exp(value_of(least) - peak)
        if weight > 0.0:
            kept = tl.minimum(kept, tl.maximum(tl.ceil((wanted - mass) / weight), 0.0))
    if (min_p > 0.0) & (weight < min_p):
        # the smallest key that min_p leaves, then the smallest logit there
        low = least
        high = keys_of(peak)
        while low < high:
            middle = low + (high - low) // 2
            if tl.exp(value_of(middle) - peak) >= min_p:
                high = middle
            else:
                low = middle + 1
        least = lowest_from(logits_ptr, vocab, low, BLOCK)
        mass, kept = mass_above(logits_ptr, vocab, peak, least, BLOCK)
        weight = tl.exp(value_of(least) - peak)
    kept = tl.where(mass > 0.0, kept, tl.maximum(kept, 1.0))  # at least one

    # the drawn key, then which of the logits at it
    target = tl.load(uniform_ptr + row) * (mass + kept * weight)
    drawn = find_key(logits_ptr, vocab, peak, target, False, True, BLOCK)
    drawn = tl.maximum(drawn, least)
    above, ties = mass_above(logits_ptr, vocab, peak, drawn, BLOCK)
    ties = tl.where(drawn == least, kept, ties)
    weight = tl.exp(value_of(drawn) - peak)
    place = tl.floor((target - above) / tl.maximum(weight, 1e-38))
    place = tl.maximum(tl.minimum(place, ties - 1.0), 0.0).to(tl.int32)
    passed = 0
    chosen = vocab - 1
    for at in range(0, vocab, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        is_id = ids < vocab
        x = tl.load(logits_ptr + ids, mask=is_id, other=float("-inf"))
        tied = (is_id & (keys_of(x) == drawn)).to(tl.int32)
        order = passed + tl.cumsum(tied, 0) - 1  # of each tied logit among all of them
        here = tl.where((tied > 0) & (order == place), ids, vocab)
        chosen = tl.minimum(chosen, tl.min(here, 0))
        passed += tl.sum(tied, 0)
    tl.store(out_ptr + row, chosen.to(tl.int64))
