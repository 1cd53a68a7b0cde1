"""Blocks: shared by content, counted, evicted in the order of their last use."""

from __future__ import annotations

from typing import Any

from tests.components.scheduler.fakes import BLOCK, report

from vllm_di.components.interfaces import Prefix
from vllm_di.components.kv_cache_manager.paged import PagedKvCacheManager


def manager(num_blocks: int = 8, *, caching: bool = True, **limits: Any) -> PagedKvCacheManager:
    return PagedKvCacheManager(report(num_blocks, **limits), prefix_caching=caching)


def fill(kv: PagedKvCacheManager, seq_id: int, tokens: list[int], salt: str | None = None) -> int:
    """A whole prompt computed; -> tokens that came from the cache."""
    found = kv.admit(seq_id, Prefix(tokens, salt), lambda cached: len(tokens) - cached)
    assert found is not None
    kv.commit(seq_id, tokens, len(tokens))
    return found[0]


def test_the_last_token_always_runs() -> None:
    kv = manager()
    assert fill(kv, 1, [1] * 8) == 0
    assert fill(kv, 2, [1] * 8) == 4
    assert fill(kv, 3, [1] * 9) == 8
    assert kv.stats() == (25, 12)


def test_all_or_nothing() -> None:
    kv = manager(4)
    assert kv.allocate(1, 3 * BLOCK, 0) is not None
    assert kv.allocate(2, 2 * BLOCK, 0) is None
    assert kv.num_free_blocks == 1
    assert kv.block_ids(2) == [[]]
    kv.free(1)
    kv.free(1)
    assert kv.num_free_blocks == 4


def test_shared_blocks_are_counted() -> None:
    kv = manager()
    fill(kv, 1, [1] * 9)
    fill(kv, 2, [1] * 9)
    assert kv.block_ids(1)[0][:2] == kv.block_ids(2)[0][:2]
    assert kv.num_free_blocks == 8 - 4
    kv.free(1)
    assert kv.num_free_blocks == 8 - 3
    kv.free(2)
    assert kv.num_free_blocks == 8


def test_the_block_unused_for_longest_goes_first() -> None:
    kv = manager(5)
    fill(kv, 1, [1] * 5)
    kv.free(1)
    fill(kv, 2, [2] * 5)
    kv.free(2)
    fill(kv, 3, [1] * 5)  # the first is used again
    kv.free(3)
    kv.allocate(4, 4 * BLOCK, 0)  # takes the blank ones, then the block of the second
    kv.free(4)
    assert fill(kv, 5, [1] * 5) == 4
    kv.free(5)
    assert fill(kv, 6, [2] * 5) == 0


def test_salt_and_beginning_tell_blocks_apart() -> None:
    kv = manager(20)
    fill(kv, 1, [1] * 4 + [2] * 5, salt="a")
    assert fill(kv, 2, [1] * 4 + [2] * 5, salt="b") == 0
    assert fill(kv, 3, [1] * 4 + [2] * 5) == 0
    assert fill(kv, 4, [3] * 4 + [2] * 5, salt="a") == 0
    assert fill(kv, 5, [1] * 4 + [2] * 5, salt="a") == 8


def test_without_caching_nothing_is_shared() -> None:
    kv = manager(caching=False)
    fill(kv, 1, [1] * 9)
    assert fill(kv, 2, [1] * 9) == 0
    assert kv.stats() == (0, 0)


def test_the_null_block_is_never_given_away() -> None:
    kv = manager(4, null_block=True)
    assert kv.num_free_blocks == 3
    assert kv.allocate(1, 3 * BLOCK, 0) == [[1, 2, 3]]
    assert kv.allocate(2, 1, 0) is None


def test_reset_forgets_what_nobody_holds() -> None:
    kv = manager()
    fill(kv, 1, [1] * 9)
    fill(kv, 2, [2] * 9)
    kv.free(1)
    kv.reset_prefix_cache()
    assert fill(kv, 3, [1] * 9) == 0
    assert fill(kv, 4, [2] * 5) == 4
