from __future__ import annotations

import pytest
from tests.components.shapes.plans import of_shape, plan

from vllm_di.components.interfaces import PlanShape
from vllm_di.components.shapes.dynamic import DynamicShapes


def test_nothing_is_padded() -> None:
    one = plan([1, 7])
    assert DynamicShapes().pad(one) is one


@pytest.mark.parametrize(("longest", "tokens"), [(2048, [1, 16]), (9, [1, 9]), (1, [1])])
def test_warm_up_stays_within_a_step(longest: int, tokens: list[int]) -> None:
    largest = PlanShape(longest, rows=longest, seqs=4, columns=200, queries=longest)
    plans = DynamicShapes().warm_up_plans(largest, of_shape)
    assert [len(p.token_ids) for p in plans] == tokens
