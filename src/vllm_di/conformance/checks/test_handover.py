"""The KV cache handed over to another platform and from it: each value, whole answers."""

from __future__ import annotations

import pytest

from vllm_di.components.interfaces import Engine
from vllm_di.components.messages import KvGroup
from vllm_di.conformance.compare import assert_same
from vllm_di.conformance.driving import Answer, Ask, ask, prompt_of, run
from vllm_di.conformance.handover import (
    ONE_GROUP,
    TWO_GROUPS,
    Side,
    Way,
    assert_crosses,
    both,
    caches,
    common_block,
    sides,
)
from vllm_di.conformance.numbers import DTYPES
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.probes import CALLS
from vllm_di.conformance.subject import REFERENCE, Subject

LENGTHS = (1, 2, 15, 16, 33, 70, 130)
WAYS: tuple[Way, ...] = ("gives", "takes")


def cross(
    subject: Subject,
    way: Way,
    *,
    groups: tuple[KvGroup, ...] = ONE_GROUP,
    ranks: int = 1,
    dtype: str,
    theirs: str,
) -> None:
    """Values from one side's cache to the other's. ``ranks`` and ``dtype`` are those of the
    platform under test, ``theirs`` the dtype of the other side's cache."""
    here, there = sides(subject)
    own = [f"model.dtype={dtype}"]
    other = ["model.dtype=float32", f"kv_layout.dtype={theirs}"]
    if len(subject.roles) > 1:  # both are as the platform says
        own = other = []
    with (
        caches(subject, here, *own, groups=groups, world_size=ranks) as ours,
        caches(subject, there, *other, groups=groups) as others,
    ):
        for one in (ours, others):
            one.allocate(common_block(ours, others))
        if not ours.is_float:
            raise NotDeclared("its cache holds no floats: not bit for bit")
        sender, receiver = (ours, others) if way == "gives" else (others, ours)
        assert_crosses(sender, receiver, subject.seed, subject.head_size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("theirs", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(subject: Subject, record: Record, dtype: str, theirs: str, way: Way) -> None:
    """Whole and partial blocks, between blocks of two sizes: equal, rounded once where the dtypes
    differ, and nothing else changes."""
    subject.dtype(dtype)
    if len(subject.roles) > 1 and theirs != dtype:
        raise NotDeclared("the dtypes are those of its roles")
    cross(subject, way, dtype=dtype, theirs=theirs)
    record.feature("KV cache handed over")


@pytest.mark.parametrize("way", WAYS)
def test_groups(subject: Subject, way: Way) -> None:
    """Two groups of layers, in blocks of their own."""
    cross(subject, way, groups=TWO_GROUPS, dtype=subject.exact_dtype, theirs="float32")


def need_ranks(side: Side) -> None:
    if 2 not in side.tensor_parallel:
        raise NotDeclared(f"the world sizes of {side.name} are {side.tensor_parallel or 'none'}")


@pytest.mark.parametrize("way", WAYS)
def test_heads_of_two_ranks(subject: Subject, way: Way) -> None:
    """Two ranks here, one there: each head arrives where it belongs."""
    need_ranks(sides(subject)[0])
    cross(subject, way, ranks=2, dtype=subject.exact_dtype, theirs="float32")


def asks() -> list[Ask]:
    return [ask(prompt_of(length), 6, logprobs=5) for length in LENGTHS]


def behind(answers: list[Answer]) -> list[Ask]:
    """The same prompts with their answers and more behind them: they begin with blocks that were
    written while tokens were chosen."""
    return [
        ask([*one.prompt, *answer.token_ids, *range(40)], 6, logprobs=5)
        for one, answer in zip(asks(), answers, strict=True)
    ]


def alone(subject: Subject, model: str) -> tuple[list[Answer], list[Answer]]:
    """Without a hand-over: of ``asks``, and of those ``behind`` them. By the platform under test;
    of one with roles by the reference."""
    judge = subject if len(subject.roles) == 1 else Subject(REFERENCE)
    try:
        folder = subject.model_folder(model)
        with judge.engine(f"model.dtype={subject.exact_dtype}", model=folder) as engine:
            first = run(engine, asks())
            return first, run(engine, behind(first))
    finally:
        if judge is not subject:
            judge.close()


def assert_crossed(engine: Engine) -> None:
    """A last prompt is handed over. Without workers of prompts the others would answer alone."""
    before = CALLS["kv_transfer"]
    run(engine, [ask([3] * 50, 1)])
    assert CALLS["kv_transfer"] > before, "nothing crosses: the workers of prompts have ended"


def assert_tokens(subject: Subject, way: Way, *more: str, model: str = "gqa") -> None:
    first, second = alone(subject, model)
    dtype = f"model.dtype={subject.exact_dtype}"
    with both(subject, way, dtype, *more, model=model) as engine:
        found = run(engine, asks())
        again = run(engine, behind(first))
        assert_crossed(engine)
    assert_same(found, first, subject.slack, "after a hand-over")
    assert_same(again, second, subject.slack, "behind an answer, after a hand-over")


def need_way(subject: Subject, way: Way) -> None:
    """Raises NotDeclared where there is no such engine, or a side hands nothing over."""
    if len(subject.roles) > 1 and way == "takes":
        raise NotDeclared("its roles say on which side prompts run")
    for side in sides(subject):
        for stage in range(len(side.stages)):
            with caches(subject, side, stage=stage) as one:
                one.allocate(one.block_size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["gqa", "mixed"])
def test_tokens(subject: Subject, record: Record, model: str, way: Way) -> None:
    """Prompts run on one side and tokens come from the other: the answers are those of one side
    alone. With layers of two kinds, in two groups, too."""
    if model == "mixed" and not subject.declared.sliding_window:
        raise NotDeclared("sliding_window")
    need_way(subject, way)
    assert_tokens(subject, way, model=model)
    record.feature("KV cache handed over")


@pytest.mark.parametrize("way", WAYS)
def test_tokens_of_two_ranks(subject: Subject, way: Way) -> None:
    """Prompts, or tokens, from two ranks in processes of their own."""
    need_ranks(sides(subject)[0])
    need_way(subject, way)
    role = "prefill" if way == "gives" else "decode"
    if len(subject.roles) == 1:
        two = ("executor=multiprocess", "executor.tensor_parallel_size=2")
        communicator = subject.assembly(*two).choices["communicator"].option
    else:
        communicator = "torch_distributed"
    more = [f"executor.{role}_tensor_parallel_size=2", f"{role}.communicator={communicator}"]
    assert_tokens(subject, way, *more)
