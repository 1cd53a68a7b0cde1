"""Log-probabilities of tiny models beside the reference, under the reference's own tokens."""

from __future__ import annotations

import pytest

from vllm_di.conformance import tiny
from vllm_di.conformance.checks.test_golden import check_model
from vllm_di.conformance.driving import ask, run
from vllm_di.conformance.golden import goldens, prompts
from vllm_di.conformance.numbers import DTYPES
from vllm_di.conformance.outcomes import Record
from vllm_di.conformance.subject import Subject

LARGEST = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
"""Of a token, in nats; half of it for the mean over all of them."""
COUNT, LENGTH = 12, 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", tiny.MODELS)
def test_logprobs(subject: Subject, record: Record, model: str, dtype: str) -> None:
    """The reference's prompts and answers together are the prompts here: every position is scored,
    and nothing depends on what was sampled before."""
    subject.dtype(dtype)
    check_model(subject, model)
    record.feature(dtype)
    wanted = goldens(model, subject.head_size, COUNT, LENGTH)
    asks, expected = [], []
    for prompt, golden in zip(prompts(COUNT), wanted, strict=True):
        asks.append(ask([*prompt, *golden.token_ids], 1, prompt_logprobs=0))
        scored = [told.logprobs[0] for told in golden.prompt_logprobs]
        expected.append([*scored, *golden.own_logprobs])
    with subject.engine(f"model.dtype={dtype}", model=model) as engine:
        found = run(engine, asks)
    worst = total = 0.0
    positions = 0
    for i, (answer, golden_values) in enumerate(zip(found, expected, strict=True)):
        values = [told.logprobs[0] for told in answer.prompt_logprobs]
        assert len(values) == len(golden_values), f"prompt {i}: {len(values)} positions scored"
        for value, wanted_value in zip(values, golden_values, strict=True):
            difference = abs(value - wanted_value)
            assert difference == difference, f"prompt {i}: NaN"
            worst, total, positions = max(worst, difference), total + difference, positions + 1
    record.figure(worst=worst, mean=total / positions, positions=positions)
    assert worst <= LARGEST[dtype], f"off by {worst:.2g} nat, {LARGEST[dtype]} may be"
    assert total / positions <= LARGEST[dtype] / 2, f"off by {total / positions:.2g} on average"
