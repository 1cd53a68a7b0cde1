"""Cached, preempted and aborted requests: the same answers, and every block comes back."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from vllm_di.components.interfaces import Engine
from vllm_di.conformance.compare import assert_same
from vllm_di.conformance.driving import PATIENCE, Answer, add, apart, ask, run
from vllm_di.conformance.golden import prompts
from vllm_di.conformance.numbers import DTYPES
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.recording import recorded
from vllm_di.conformance.subject import Subject

SHARED = [(11 * i) % 240 for i in range(130)]
"""A prefix that several prompts share, several blocks long."""


def exact(subject: Subject, *more: str) -> list[str]:
    return [f"model.dtype={subject.exact_dtype}", *more]


def uncached(subject: Subject, prompts: list[list[int]], length: int = 8) -> list[Answer]:
    asks = apart(ask(prompt, length, logprobs=20) for prompt in prompts)
    with subject.engine(*exact(subject, *subject.prefix_cache_off)) as engine:
        return [run(engine, [one])[0] for one in asks]


def common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with; the last token of a prompt always runs."""
    pairs = zip(one[:-1], other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def used(engine: Engine) -> float:
    """Share of the blocks that live sequences hold, 0 to 1."""
    return engine.step().stats.kv_cache_usage


def test_cached_equals_uncached(subject: Subject) -> None:
    subject.need_prefix_cache()
    texts = [[*SHARED, 1, 2], [*SHARED, 3], [*SHARED[:70], 9, 9], SHARED, [*SHARED, 1, 2]]
    # the same tokens at the same places behind another beginning: their blocks are others
    texts.append([77] * len(SHARED[:64]) + SHARED[64:])
    texts.append(SHARED[64:] + SHARED[:64])
    wanted = uncached(subject, texts)
    with recorded(subject, *exact(subject)) as (engine, _):
        size = engine.report.block_size
        first = [run(engine, [ask(text, 8, logprobs=20)])[0] for text in texts]
        together = run(engine, [ask(text, 8, logprobs=20) for text in texts])
        assert used(engine) == 0
    assert_same(first, wanted, subject.slack, "one after the other")
    assert_same(together, wanted, subject.slack, "together")
    for i, answer in enumerate(first):
        could = max((common(texts[i], other) for other in texts[:i]), default=0) // size
        assert (answer.num_cached > 0) == (could > 0), (
            f"request {i}: {answer.num_cached} tokens found in the cache, {could} blocks are there"
        )
    assert first[4].num_cached < len(texts[4]), "the last token of a prompt must run"


def test_salts_do_not_share(subject: Subject) -> None:
    subject.need_prefix_cache()
    with subject.engine(*exact(subject)) as engine:
        if engine.report.block_size > len(SHARED):
            raise NotDeclared("its blocks are longer than a tiny model's prompts")
        for salt, found in (("a", False), ("b", False), (None, False), ("a", True), (None, True)):
            one = ask([*SHARED, 4], 2)
            one.salt = salt
            answer = run(engine, [one])[0]
            assert (answer.num_cached > 0) == found, f"salt {salt!r}: {answer.num_cached} cached"


def test_a_reset_forgets(subject: Subject) -> None:
    subject.need_prefix_cache()
    with subject.engine(*exact(subject)) as engine:
        run(engine, [ask(SHARED, 2)])
        engine.reset_prefix_cache()
        assert run(engine, [ask(SHARED, 2)])[0].num_cached == 0


def test_preempted_equals_not_preempted(subject: Subject) -> None:
    """With so few blocks that requests preempt each other and are computed again."""
    texts = [[(5 * i + n) % 240 for i in range(90 + 9 * n)] for n in range(6)]
    wanted = uncached(subject, texts, 48)
    few = exact(subject, f"worker.num_blocks={blocks_for(subject, 2)}")
    with recorded(subject, *few) as (engine, _):
        found = run(engine, [ask(text, 48, logprobs=20) for text in texts])
        stats = engine.step().stats
    assert stats.num_preemptions > 0, "nothing was preempted: the test shows nothing"
    assert stats.kv_cache_usage == 0, f"{stats.kv_cache_usage:.0%} of the blocks never came back"
    assert_same(found, wanted, subject.slack, "after a preemption")


def blocks_for(subject: Subject, sequences: int) -> int:
    """Enough blocks for that many full sequences, and one more."""
    with subject.parts("kv_layout", "model") as container:
        size, longest = container.kv_layout().block_size, container.model().max_model_len
    return max(-(-longest // size) + 1, -(-180 // size) * sequences)


def test_aborts_return_all_blocks(subject: Subject, record: Record) -> None:
    """Requests are aborted at random steps; the others get the answers that they get alone."""
    count = 1000 if subject.full else 120
    chance = random.Random(subject.seed)
    keep = prompts(4)
    wanted = uncached(subject, keep, 12)
    with recorded(subject, *exact(subject)) as (engine, recorder):
        live: list[str] = []
        started = aborted = 0

        def disturb(_step: int) -> None:
            nonlocal started, aborted
            while len(live) < 6 and started < count:
                length = chance.randrange(1, 90)
                prompt = SHARED[:length] if started % 2 else [chance.randrange(250)] * length
                add(engine, f"doomed-{started}", ask(prompt, 100))
                live.append(f"doomed-{started}")
                started += 1
            for name in [n for n in live if chance.random() < 0.3]:
                engine.abort(name)
                live.remove(name)
                aborted += 1

        found = run(engine, [ask(p, 12, logprobs=20) for p in keep], each_step=disturb)
        deadline = time.monotonic() + PATIENCE
        while live or started < count:
            disturb(0)
            engine.step()
            assert time.monotonic() < deadline, "aborted requests never end"
        assert not engine.has_work()
        engine.step()
        left = used(engine)
        steps = len(recorder.plans)
    record.figure(aborted=aborted, steps=steps)
    assert left == 0, f"{left:.1%} of the blocks never came back"
    assert_same(found, wanted, subject.slack, "among aborted requests")


KV_DTYPES = (*DTYPES, "uint8")


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_kv_dtypes(subject: Subject, record: Record, dtype: str) -> None:
    """A cache of another dtype than the model's gives nearly the same answers."""
    if dtype not in (subject.declared.kv_dtypes or subject.declared.dtypes):
        raise NotDeclared(f"kv_dtypes are {', '.join(subject.declared.kv_dtypes)}")
    if not subject.declared.kv_dtypes and not subject.has_key("kv_layout.dtype"):
        raise NotDeclared("its cache has the model's dtype, whatever that is")
    record.feature(f"KV cache in {dtype}")
    texts = prompts(3)
    wanted = uncached(subject, texts, 4)
    with subject.engine(*exact(subject, f"kv_layout.dtype={dtype}")) as engine:
        found = run(engine, [ask(text, 4, logprobs=20) for text in texts])
    slack = {"float32": subject.slack, "float16": 2e-2, "bfloat16": 8e-2, "uint8": 8e-2}[dtype]
    assert_same(found, wanted, max(slack, subject.slack), f"with a cache in {dtype}")
