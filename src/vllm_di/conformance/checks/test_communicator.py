"""Collectives among ranks in processes of their own."""

from __future__ import annotations

import pytest

from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.ranks import Answers, on_ranks
from vllm_di.conformance.subject import Subject

WORLDS = (1, 2, 4, 8)
NOTICE_SECONDS = 10.0
MORE = ("executor=multiprocess",)


def answers(subject: Subject, world: int) -> list[Answers]:
    if world not in subject.declared.tensor_parallel:
        raise NotDeclared(f"its world sizes are {subject.declared.tensor_parallel}")
    more = (*MORE, f"executor.tensor_parallel_size={world}") if world > 1 else ()
    return on_ranks(subject.assembly(*more), world)


@pytest.mark.parametrize("world", WORLDS)
def test_collectives(subject: Subject, record: Record, world: int) -> None:
    """Integers exactly, in rank order, and the same bits on every rank after an all_reduce."""
    found = answers(subject, world)
    if world > 1:
        record.feature(f"tensor parallel {world}")
    base = [[10 * rank + i for i in range(4)] for rank in range(world)]
    total = [sum(column) for column in zip(*base, strict=True)]
    for rank, one in enumerate(found):
        assert one.rank == rank
        assert one.world_size == world
        assert one.all_reduce == total, "all_reduce is no sum"
        assert one.all_gather == [x for row in base for x in row], "all_gather: rank order"
        columns = [[row[2 * i : 2 * i + 2] for row in base] for i in range(2)]
        assert one.all_gather_rows == [[x for r in half for x in r] for half in columns]
    assert len({tuple(one.float_sum) for one in found}) == 1, "ranks differ after all_reduce"
    for value, exact in zip(found[0].float_sum, found[0].float_expected, strict=True):
        assert abs(value - exact) <= 1e-5 + 1e-5 * abs(exact)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_dead_peer_is_noticed(subject: Subject, world: int) -> None:
    if world not in subject.declared.tensor_parallel:
        raise NotDeclared(f"its world sizes are {subject.declared.tensor_parallel}")
    more = (*MORE, f"executor.tensor_parallel_size={world}")
    found = on_ranks(subject.assembly(*more), world, deserter=world - 1)
    assert found[0].noticed_after is not None, "a collective without a peer came to an end"
    assert found[0].noticed_after <= NOTICE_SECONDS
