"""Attention over block tables in random order: decodes, chunks, slots that nobody may read."""

from __future__ import annotations

import pytest

from vllm_di.conformance.attention import judge, shapes
from vllm_di.conformance.numbers import DTYPES
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.paged import Load, spec_of
from vllm_di.conformance.subject import Subject


@pytest.mark.parametrize("dtype", DTYPES)
def test_decodes(subject: Subject, record: Record, dtype: str) -> None:
    """Ragged lengths at the edges of blocks. Every slot beyond them holds NaN."""
    record.feature(dtype)
    with judge(subject, dtype) as it:
        size = it.layout.block_size
        edges = [0, 1, size - 2, size - 1, size, size + 1, 2 * size - 1, 2 * size, 3 * size + 2]
        for heads, kv_heads, head_size in shapes(subject):
            spec = spec_of(heads, kv_heads, head_size)
            it.compare(spec, [Load(before, 1) for before in edges])
            for before in edges:
                it.compare(spec, [Load(before, 1)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed(subject: Subject, record: Record, dtype: str) -> None:
    """Decodes, whole prompts and later chunks of prompts in one batch."""
    record.feature(dtype)
    with judge(subject, dtype) as it:
        size = it.layout.block_size
        loads = [Load(7, 1), Load(size, 1), Load(0, 19), Load(size - 1, 2), Load(size + 3, size)]
        for heads, kv_heads, head_size in shapes(subject):
            it.compare(spec_of(heads, kv_heads, head_size), loads)


@pytest.mark.parametrize("window", [1, 5, 32, 40])
def test_window(subject: Subject, record: Record, window: int) -> None:
    if not subject.declared.sliding_window:
        raise NotDeclared("sliding_window")
    record.feature("sliding window")
    with judge(subject, subject.declared.dtypes[0]) as it:
        loads = [Load(n, 1) for n in (0, window - 1, window, window + 1, 100)]
        for heads, kv_heads, head_size in shapes(subject):
            spec = spec_of(heads, kv_heads, head_size, window=window)
            it.compare(spec, [*loads, Load(50, 9)])


def test_soft_cap(subject: Subject, record: Record) -> None:
    if not subject.declared.soft_cap:
        raise NotDeclared("soft_cap")
    record.feature("soft cap")
    with judge(subject, subject.declared.dtypes[0]) as it:
        for heads, kv_heads, head_size in shapes(subject):
            spec = spec_of(heads, kv_heads, head_size, soft_cap=0.5)
            it.compare(spec, [Load(33, 1), Load(70, 1), Load(20, 6)])


def test_long_contexts(subject: Subject) -> None:
    with judge(subject, subject.declared.dtypes[0]) as it:
        heads, kv_heads, head_size = shapes(subject)[0]
        longest = 4096 if subject.full else 1500
        it.compare(spec_of(heads, kv_heads, head_size), [Load(longest, 1), Load(3, 1)])
