from __future__ import annotations

import pytest

from vllm_di.components.shapes.capture_sizes import CaptureSizes
from vllm_di.errors import ConfigError


def test_steps_are_padded_to_the_next_size() -> None:
    shapes = CaptureSizes(sizes=[8, 1, 4], max_num_seqs=6)
    assert [shapes.padded_tokens(n) for n in range(1, 9)] == [1, 4, 4, 4, 6, 6, 7, 8]
    assert shapes.warm_up_sizes(2048) == [1, 4, 6, 2048]
    assert shapes.warm_up_sizes(5) == [1, 4, 5]


def test_the_most_sequences_are_a_size() -> None:
    assert CaptureSizes(sizes=[1, 2], max_num_seqs=64).padded_tokens(40) == 64


def test_no_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="shapes=dynamic"):
        CaptureSizes(sizes=[], max_num_seqs=4)
