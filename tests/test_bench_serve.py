"""What the client of ``bench serve`` makes of a stream's events."""

from __future__ import annotations

import pytest

from vllm_di.commands.bench_serve import Timing


def test_each_token_has_its_time() -> None:
    timing = Timing()
    for seconds, count in ((0.5, 1), (0.6, 2), (0.8, 3)):
        timing.came(seconds, count)
    assert timing.tokens == pytest.approx([0.5, 0.6, 0.8])


def test_tokens_of_one_event_share_the_time_since_the_last() -> None:
    timing = Timing()
    for seconds, count in ((0.5, 1), (0.9, 3), (0.9, 3)):  # the last has the usage alone
        timing.came(seconds, count)
    assert timing.tokens == pytest.approx([0.5, 0.7, 0.9])


def test_tokens_of_the_first_event_came_with_it() -> None:
    timing = Timing()
    timing.came(0.5, 2)
    assert timing.tokens == [0.5, 0.5]
