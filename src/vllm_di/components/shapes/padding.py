"""Padding a plan to the shape that a policy chose. Nothing that is added touches a sequence's
blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from vllm_di.components.interfaces import BatchPlan, GroupTables, PlanShape


def pad_tokens(plan: BatchPlan, tokens: int, slot: int = -1) -> BatchPlan:
    """``plan`` with ``tokens`` token rows; those that are added belong to no sequence and have
    ``slot``."""
    if tokens == len(plan.token_ids):
        return plan
    return replace(
        plan,
        token_ids=grown(plan.token_ids, tokens),
        positions=grown(plan.positions, tokens),
        slot_mapping=grown(plan.slot_mapping, tokens, slot),
        token_types=None if plan.token_types is None else grown(plan.token_types, tokens),
        more_groups=[
            replace(tables, slot_mapping=grown(tables.slot_mapping, tokens, slot))
            for tables in plan.more_groups
        ],
    )


def pad_to(plan: BatchPlan, shape: PlanShape, slot: int = -1) -> BatchPlan:
    """``plan`` with all sizes of ``shape``. Sequences that are added have no query and no context,
    and their blocks are 0, as are the blocks of columns that are added: nobody reads them as a
    token. Raises ValueError where the plan does not fit."""
    found = plan.shape
    for size in ("tokens", "rows", "seqs", "columns", "queries"):
        if getattr(found, size) > getattr(shape, size):
            raise ValueError(f"{found} does not fit {shape}: {size}")
    padded = pad_tokens(plan, shape.tokens, slot)
    absent = [0] * (shape.seqs - found.seqs)

    def tables(old: BatchPlan | GroupTables) -> GroupTables:
        return GroupTables(
            seq_lens=grown(old.seq_lens, shape.seqs),
            block_table=_grown_table(old.block_table, shape.seqs, shape.columns),
            slot_mapping=old.slot_mapping,
            seq_lens_host=[*old.seq_lens_host, *absent],
        )

    first = tables(padded)
    return replace(
        padded,
        query_start=grown(plan.query_start, shape.seqs + 1, sum(plan.query_lens_host)),
        seq_lens=first.seq_lens,
        block_table=first.block_table,
        seq_lens_host=first.seq_lens_host,
        query_lens_host=[*plan.query_lens_host, *absent],
        logits_rows=grown(plan.logits_rows, shape.rows),
        more_groups=[tables(group) for group in padded.more_groups],
        padded_to=shape,
    )


def blank_of(
    shape: PlanShape, blank: Callable[[PlanShape], BatchPlan], slot: int = -1
) -> BatchPlan:
    """A plan of the static ``shape`` for the warm-up: one token, and padding."""
    one = blank(PlanShape(tokens=1, rows=1, seqs=1, columns=1, queries=1))
    nowhere = replace(
        one,
        slot_mapping=one.slot_mapping.clamp(min=slot),
        more_groups=[
            replace(group, slot_mapping=group.slot_mapping.clamp(min=slot))
            for group in one.more_groups
        ],
    )
    return pad_to(nowhere, shape, slot)


def without_padding(plan: BatchPlan) -> BatchPlan:
    """``plan`` without the token rows that belong to no sequence, for programs that take any
    shape."""
    total = sum(plan.query_lens_host)
    if total == len(plan.token_ids):
        return plan
    return replace(
        plan,
        token_ids=plan.token_ids[:total],
        positions=plan.positions[:total],
        slot_mapping=plan.slot_mapping[:total],
        hidden=None if plan.hidden is None else plan.hidden[:total],
        token_types=None if plan.token_types is None else plan.token_types[:total],
        more_groups=[
            replace(tables, slot_mapping=tables.slot_mapping[:total]) for tables in plan.more_groups
        ],
    )


def grown(rows: Tensor, size: int, value: int = 0) -> Tensor:
    """[n, ...] -> [size, ...]; ``value`` stands in what is added."""
    if len(rows) == size:
        return rows
    out = rows.new_full((size, *rows.shape[1:]), value)
    out[: len(rows)] = rows
    return out


def _grown_table(table: Tensor, seqs: int, columns: int) -> Tensor:
    if table.shape == (seqs, columns):
        return table
    out = table.new_zeros(seqs, columns)
    out[: table.shape[0], : table.shape[1]] = table
    return out
