from __future__ import annotations

import pytest

from vllm_di.components.shapes.dynamic import DynamicShapes


@pytest.mark.parametrize("tokens", [1, 7, 2048])
def test_nothing_is_padded(tokens: int) -> None:
    assert DynamicShapes().padded_tokens(tokens) == tokens


def test_warm_up_stays_within_a_step() -> None:
    assert DynamicShapes().warm_up_sizes(2048) == [1, 16]
    assert DynamicShapes().warm_up_sizes(9) == [1, 9]
    assert DynamicShapes().warm_up_sizes(1) == [1]
