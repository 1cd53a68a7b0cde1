"""Nothing that the C++ kernels read depends on torch's default dtype, which any library of a
process may change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.components.ops.libraries import ISAS, library, random

from vllm_di import LLM, SamplingParams
from vllm_di.components.quantized import by_channel
from vllm_di.conformance.run import run
from vllm_di.conformance.subject import Subject

EVERY_CASE = ("ops", "kv/test_attention_writes", "prefill/test_lengths", "decode/test_decodes")
"""Of the suite: all ops, with the cache and attention."""


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Another default dtype than the usual one, for one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    try:
        yield request.param
    finally:
        torch.set_default_dtype(before)


def test_every_op_case(default_dtype: torch.dtype) -> None:
    subject = Subject(["platform=cpu"])
    try:
        report = run(subject, only=EVERY_CASE, quiet=True)
    finally:
        subject.close()
    assert torch.get_default_dtype() is default_dtype
    assert not report.failed, report.failed[0].message
    assert sum(case.outcome == "pass" for check in report.checks for case in check.cases) > 40


@pytest.mark.parametrize("outputs", [1, 33, 577])
@pytest.mark.usefixtures("default_dtype")
def test_scales_by_channel_are_fp32(outputs: int) -> None:
    """They were bf16 under another default dtype, and read past their end."""
    weight = by_channel(random(outputs, 64))
    packed = library(ISAS[0]).pack_quantized(weight)
    assert packed.scales.dtype is torch.float32
    assert torch.equal(packed.scales[:outputs], weight.scale[:, 0])


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_an_engine_gives_the_same_tokens(quantization: str) -> None:
    overrides = ["platform=cpu", "model.dtype=float32", f"quantization={quantization}"]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def tokens() -> list[list[int]]:
        with LLM("tiny", overrides=overrides) as llm:
            outputs = llm.generate(["a", "hello world", "x" * 40], params)
            return [output.outputs[0].token_ids for output in outputs]

    wanted = tokens()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert tokens() == wanted
    finally:
        torch.set_default_dtype(before)
