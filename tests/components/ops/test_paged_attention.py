"""Attention over block tables, on every instruction set: prefill, chunks, decode, mixed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.components.ops.libraries import DTYPES, ISAS, REFERENCE, close, library, random
from torch import Tensor

HEADS = [(3, 3), (9, 3), (4, 1), (8, 1)]
"""(heads, kv heads): groups of 1, 3, 4 and 8."""
MIXED = [(1, 1), (1, 37), (5, 5), (0, 9), (7, 130), (1, 600), (64, 64), (33, 65), (1, 64)]
"""(queries, context) of each sequence."""


def attend(
    isa: str,
    sequences: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (9, 3),
    size: int = 64,
    block: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    soft_cap: float | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(the kernel's, the reference's in fp32). Blocks lie in any order, and are NaN until
    written."""
    query, kv = heads
    blocks = [-(-context // block) for _, context in sequences]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(blocks) + 2, generator=generator).to(torch.int32)
    table = torch.full((len(sequences), max(blocks, default=0) + 1), 2**30, dtype=torch.int32)
    keys = torch.full((sum(blocks) + 2, kv, block, size), float("nan"), dtype=dtype)
    values = keys.clone()
    at = 0
    for row, ((_, context), count) in enumerate(zip(sequences, blocks, strict=True)):
        table[row, :count] = order[at : at + count]
        at += count
        place = torch.arange(context)
        slots = table[row, place // block].long() * block + place % block
        k, v = (random(context, kv, size, dtype=dtype, seed=seed + row + s) for s in (10, 20))
        REFERENCE.write_kv(k, v, keys, values, slots)
    lengths = torch.tensor([q for q, _ in sequences])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(torch.int32)
    contexts = torch.tensor([c for _, c in sequences], dtype=torch.int32)
    qkv = random(int(lengths.sum()), (query + 2) * size, dtype=dtype, seed=seed)
    q = qkv[:, : query * size].unflatten(1, (query, size))
    rest = (starts, contexts, table, size**-0.5, window, soft_cap)
    got = library(isa).paged_attention(q, keys, values, *rest)
    want = REFERENCE.paged_attention(q.float(), keys.float(), values.float(), *rest)
    return got, want


every_isa = pytest.mark.parametrize("isa", ISAS)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_shapes(isa: str, dtype: torch.dtype, heads: tuple[int, int], size: int) -> None:
    close(*attend(isa, MIXED, heads=heads, size=size, dtype=dtype))


@every_isa
@pytest.mark.parametrize("size", [2, 8, 24, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_odd_head_sizes(isa: str, dtype: torch.dtype, size: int) -> None:
    close(*attend(isa, MIXED, size=size, dtype=dtype))


@every_isa
@pytest.mark.parametrize("window", [1, 5, 64, 100, 1000])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_windows_and_soft_caps(isa: str, window: int, soft_cap: float | None) -> None:
    close(*attend(isa, MIXED, window=window, soft_cap=soft_cap))
    close(*attend(isa, MIXED, soft_cap=soft_cap, dtype=torch.float32))


@every_isa
@pytest.mark.parametrize("block", [1, 3, 16, 128])
def test_block_sizes(isa: str, block: int) -> None:
    close(*attend(isa, MIXED, block=block))


@every_isa
def test_no_sequence_and_no_query(isa: str) -> None:
    close(*attend(isa, []))
    close(*attend(isa, [(0, 3)]))


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(
        st.integers(0, 150).flatmap(
            lambda context: st.tuples(st.integers(0, context), st.just(context))
        ),
        max_size=6,
    ),
    heads=st.sampled_from([(1, 1), (2, 1), (6, 2), (8, 1), (12, 12)]),
    size=st.sampled_from([2, 16, 64, 72, 128]),
    block=st.sampled_from([1, 7, 16, 32]),
    window=st.none() | st.integers(1, 200),
    bf16=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_batch(
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    size: int,
    block: int,
    window: int | None,
    bf16: bool,
    seed: int,
) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    close(
        *attend(
            ISAS[0],
            sequences,
            heads=heads,
            size=size,
            block=block,
            window=window,
            dtype=dtype,
            seed=seed,
        )
    )
