"""Resident bytes are those in use: a free heap neither hides a leak nor looks like one."""

from __future__ import annotations

from vllm_di.conformance.footprint import resident

BLOCK, MANY = 2**16, 1000
MIB = 2**20


def free_heap() -> bytearray:
    """Some 60 MiB that the allocator keeps; what is returned, the last block, keeps it there."""
    blocks = [bytearray(BLOCK) for _ in range(MANY)]
    return blocks.pop()


def test_a_leak_is_seen_where_it_fits_into_the_free_heap() -> None:
    pin = free_heap()
    before = resident()
    leaked = [bytearray(BLOCK) for _ in range(MANY // 4)]
    assert resident() - before > 12 * MIB
    del pin, leaked


def test_a_free_heap_is_no_leak() -> None:
    before = resident()
    pin = free_heap()
    assert resident() - before < 12 * MIB
    del pin
