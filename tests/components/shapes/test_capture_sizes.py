from __future__ import annotations

import pytest
from tests.components.shapes.plans import of_shape, plan

from vllm_di.components.interfaces import PlanShape
from vllm_di.components.shapes.capture_sizes import CaptureSizes
from vllm_di.errors import ConfigError


def test_steps_are_padded_to_the_next_size() -> None:
    shapes = CaptureSizes(sizes=[8, 1, 4], max_num_seqs=6)
    padded = [shapes.pad(plan([n])) for n in range(1, 9)]
    assert [len(p.token_ids) for p in padded] == [1, 4, 4, 4, 6, 6, 7, 8]
    assert [p.slot_mapping.tolist().count(-1) for p in padded] == [0, 2, 1, 0, 1, 0, 0, 0]
    assert all(p.query_lens_host == [n] for n, p in enumerate(padded, 1))


@pytest.mark.parametrize(
    ("seqs", "longest", "tokens"), [(6, 2048, [1, 4, 6, 2048]), (5, 7, [1, 4, 7])]
)
def test_warm_up_runs_the_sizes_as_decodes_and_the_longest_prompt(
    seqs: int, longest: int, tokens: list[int]
) -> None:
    shapes = CaptureSizes(sizes=[8, 1, 4], max_num_seqs=6)
    largest = PlanShape(longest, rows=longest, seqs=seqs, columns=200, queries=longest)
    plans = list(shapes.warm_up_plans(largest, of_shape))
    assert [len(p.token_ids) for p in plans] == tokens
    assert [p.max_query_len for p in plans] == [*[1] * (len(tokens) - 1), longest]


def test_the_most_sequences_are_a_size() -> None:
    assert len(CaptureSizes(sizes=[1, 2], max_num_seqs=64).pad(plan([40])).token_ids) == 64


def test_no_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="shapes=dynamic"):
        CaptureSizes(sizes=[], max_num_seqs=4)
