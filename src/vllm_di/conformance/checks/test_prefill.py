"""Attention over whole prompts: causal, grouped heads, windows, soft caps."""

from __future__ import annotations

import pytest

from vllm_di.conformance.attention import judge, shapes
from vllm_di.conformance.numbers import DTYPES
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.paged import Load, spec_of
from vllm_di.conformance.subject import Subject

LENGTHS = (1, 2, 15, 16, 17, 33, 64, 129)
LONG = (1025, 4097)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(subject: Subject, record: Record, dtype: str) -> None:
    record.feature(dtype)
    with judge(subject, dtype) as it:
        for heads, kv_heads, size in shapes(subject):
            spec = spec_of(heads, kv_heads, size)
            for length in LENGTHS:
                it.compare(spec, [Load(0, length)])
            it.compare(spec, [Load(0, length) for length in (5, 1, 31, 32, 33)])


def test_head_sizes(subject: Subject, record: Record) -> None:
    """Each that is declared, or some where any is."""
    sizes = subject.declared.head_sizes or (16, 72, 96, 192, 256)
    with judge(subject, subject.declared.dtypes[0]) as it:
        for size in sizes:
            it.compare(spec_of(4, 2, size), [Load(0, 37), Load(20, 1)])
    record.figure(head_sizes=list(sizes))


@pytest.mark.parametrize("length", LONG)
def test_long_prompt(subject: Subject, length: int) -> None:
    if length > LONG[0] and not subject.full:
        length = LONG[0] + 512
    with judge(subject, subject.declared.dtypes[0]) as it:
        heads, kv_heads, size = shapes(subject)[0]
        it.compare(spec_of(heads, kv_heads, size), [Load(0, length)])


@pytest.mark.parametrize("window", [1, 2, 7, 16, 33, 500])
def test_window(subject: Subject, record: Record, window: int) -> None:
    if not subject.declared.sliding_window:
        raise NotDeclared("sliding_window")
    record.feature("sliding window")
    with judge(subject, subject.declared.dtypes[0]) as it:
        for heads, kv_heads, size in shapes(subject):
            spec = spec_of(heads, kv_heads, size, window=window)
            it.compare(spec, [Load(0, 70), Load(0, window), Load(0, window + 1)])


@pytest.mark.parametrize("window", [None, 9])
def test_soft_cap(subject: Subject, record: Record, window: int | None) -> None:
    if not subject.declared.soft_cap:
        raise NotDeclared("soft_cap")
    record.feature("soft cap")
    with judge(subject, subject.declared.dtypes[0]) as it:
        for heads, kv_heads, size in shapes(subject):
            # a cap low enough to bend the scores
            spec = spec_of(heads, kv_heads, size, window=window, soft_cap=0.5)
            it.compare(spec, [Load(0, 40), Load(0, 3)])
