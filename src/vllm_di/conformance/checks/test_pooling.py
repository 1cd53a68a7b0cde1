"""Vectors of prompts are made of the prompt's own hidden states: all that are wanted, each once,
and no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

from vllm_di.components.interfaces import Engine
from vllm_di.conformance.checks.test_chunks import limits
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.pooled import LENGTHS, hidden_states, run, texts
from vllm_di.conformance.subject import Subject
from vllm_di.errors import ConfigError

POOLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda rows: rows[-1],
    "mean": lambda rows: rows.mean(0),
    "cls": lambda rows: rows[0],
}
"""Options of the group ``pooler`` -> what is made of hidden states [tokens, hidden]."""
SLACK = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""By which the numbers of two vectors of length 1 may differ."""
FEATURE = "pooling"


@contextmanager
def pooling_engine(subject: Subject, pooler: str, *more: str) -> Iterator[Engine]:
    """Raises NotDeclared where the platform's model or program pools nothing."""
    dtype = f"model.dtype={subject.exact_dtype}"
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(subject.engine(f"pooler={pooler}", dtype, *more))
        except ConfigError as error:
            if error.key != "pooler":
                raise
            raise NotDeclared(str(error)) from None
        yield engine


def wanted(subject: Subject, pooler: str) -> list[Tensor]:
    """The reference's vectors, in float64."""
    pooled = [POOLERS[pooler](rows.double()) for rows in hidden_states(subject.head_size)]
    return [vector / vector.norm() for vector in pooled]


def assert_near(
    subject: Subject, found: Sequence[Tensor], expected: Sequence[Tensor], what: str
) -> None:
    slack = SLACK[subject.exact_dtype]
    for length, ours, theirs in zip(LENGTHS, found, expected, strict=True):
        assert ours.shape == theirs.shape, f"{what}: {len(ours)} numbers, not {len(theirs)}"
        off = float((ours.double() - theirs).abs().max())
        assert off <= slack, f"{what}, {length} tokens: off by {off:.3g}, {slack:g} may be"


@pytest.mark.parametrize("pooler", POOLERS)
def test_vectors(subject: Subject, record: Record, pooler: str) -> None:
    """Prompts of several lengths, one by one and together, padded as the platform pads."""
    record.feature(FEATURE)
    expected = wanted(subject, pooler)
    with pooling_engine(subject, pooler, *subject.prefix_cache_off) as engine:
        alone = [run(engine, [text])[0] for text in texts()]
        together = run(engine, texts())
        assert engine.step().stats.kv_cache_usage == 0
    assert_near(subject, alone, expected, "alone")
    assert_near(subject, together, expected, "together")


@pytest.mark.parametrize("pooler", POOLERS)
def test_chunks(subject: Subject, pooler: str) -> None:
    """Prompts in chunks of at most 32 tokens, which all that run share."""
    if not limits(subject).chunked_prefill:
        raise NotDeclared("chunked_prefill")
    budget = "scheduler.max_num_batched_tokens=32"
    expected = wanted(subject, pooler)
    with pooling_engine(subject, pooler, budget, *subject.prefix_cache_off) as engine:
        alone = [run(engine, [text])[0] for text in texts()]
        together = run(engine, texts())
    assert_near(subject, alone, expected, "in chunks")
    assert_near(subject, together, expected, "in chunks, together")


@pytest.mark.parametrize("pooler", POOLERS)
def test_prefix_hits(subject: Subject, pooler: str) -> None:
    """The same prompts again: what is found in the cache may be left out only where it is not
    read."""
    subject.need_prefix_cache()
    expected = wanted(subject, pooler)
    with pooling_engine(subject, pooler) as engine:
        run(engine, texts())
        again = run(engine, texts())
        stats, size = engine.step().stats, engine.report.block_size
        assert engine.report.pooling is not None
        reads_all = engine.report.pooling.every_token
    assert_near(subject, again, expected, "from the prefix cache")
    if not reads_all and size < max(LENGTHS):
        assert stats.prefix_cache_hits > 0, "nothing was found in the prefix cache"


def test_a_vector_is_finite_and_of_length_one(subject: Subject) -> None:
    with pooling_engine(subject, "mean") as engine:
        for vector in run(engine, texts()):
            assert torch.isfinite(vector).all()
            assert abs(float(vector.norm()) - 1) < 1e-3, f"a vector of length {vector.norm():.4f}"
