from __future__ import annotations

import pytest
import torch
from tests.components.sampler.rows import check_logprobs, noise

from vllm_di.components.sampler.logprobs import PIECE, STRETCH, report, top


@pytest.mark.parametrize("vocab_size", [20, 128, 20 * STRETCH + 5, 21 * STRETCH, 5000, 8191])
def test_the_largest_are_found_wherever_they_lie(vocab_size: int) -> None:
    values = noise(9, vocab_size)
    values[0] = torch.arange(vocab_size)  # all in the last stretch, or behind it
    values[1] = -torch.arange(vocab_size)
    values[2, -1], values[2, 0] = 99.0, 98.0
    found, ids = top(values, 20)
    assert torch.equal(found, values.sort(-1, descending=True).values[:, :20])
    assert torch.equal(found, values.gather(-1, ids))
    assert all(len(set(row)) == 20 for row in ids.tolist())


def test_masked_tokens_are_still_tokens() -> None:
    values = torch.full((1, 40 * STRETCH), float("-inf"))
    values[0, 77] = 0.0
    found, ids = top(values, 20)
    assert found[0, 0] == 0.0 and ids[0, 0] == 77
    assert len(set(ids[0].tolist())) == 20


def test_equal_logprobs_come_in_order_of_their_ids() -> None:
    found = report(torch.zeros(1, 12), [5], [12])[0]
    assert found.token_ids == [5, *range(12)]
    assert found.rank == 1


def test_counts_of_neighbours_do_not_matter() -> None:
    logits = noise(PIECE + 3, 6000)
    ids = [int(row.argmax()) if i % 2 else 17 * i for i, row in enumerate(logits)]
    ids[2] = int(logits[2].argmin())
    counts = [(i * 7) % 21 for i in range(len(ids))]
    found = report(logits, ids, counts)
    for i, count in enumerate(counts):
        check_logprobs(found[i], logits[i], ids[i], count)
        assert report(logits[i : i + 1], ids[i : i + 1], [count]) == [found[i]]
