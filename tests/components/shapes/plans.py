"""Plans of some shape, for tests of shape policies."""

from __future__ import annotations

import torch

from vllm_di.components.interfaces import BatchPlan, PlanShape


def plan(queries: list[int], *, rows: int | None = None, columns: int = 2) -> BatchPlan:
    """Sequences with these queries after a context of five tokens; slots and blocks are no
    padding's."""
    total, lengths = sum(queries), [5 + query for query in queries]
    return BatchPlan(
        token_ids=torch.arange(total) + 1,
        positions=torch.arange(total) + 1,
        query_start=torch.tensor([0, *queries]).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=torch.ones(len(queries), columns, dtype=torch.int32),
        slot_mapping=torch.arange(total) + 100,
        logits_rows=torch.arange(len(queries) if rows is None else rows),
        query_lens_host=list(queries),
        seq_lens_host=lengths,
    )


def of_shape(shape: PlanShape) -> BatchPlan:
    """As the model runner's blank plans."""
    queries = [1] * shape.seqs
    left = shape.tokens - shape.seqs
    for row in range(shape.seqs):
        more = min(left, shape.queries - 1)
        queries[row], left = 1 + more, left - more
    assert not left and queries[0] == shape.queries
    return plan(queries, rows=shape.rows, columns=shape.columns)
