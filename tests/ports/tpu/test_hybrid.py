"""One model in two stages, the first compiled by XLA and the second on the CPU's kernels."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_di import LLM, SamplingParams
from vllm_di.conformance.run import run
from vllm_di.conformance.subject import Subject
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain

pytest.importorskip("jax", reason="platform=tpu was not tested: pip install 'vllm-di[tpu]'")

HYBRID = ("platform=hybrid_tpu_cpu", "stages.0.shapes.sizes=[16,512]")
"""Two programs for steps instead of six."""
CUT = ("stages.0.model.layers=[0,1]", "stages.1.model.layers=[1,null]")


def tokens(*overrides: str) -> list[list[int]]:
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    with LLM("tiny", overrides=["model.dtype=float32", *overrides]) as llm:
        answers = llm.generate(["a", "hello world", "x" * 70], greedy)
    return [answer.outputs[0].token_ids for answer in answers]


def test_the_tokens_are_those_of_the_cpu() -> None:
    told: Any = explain(assemble([*HYBRID, "model=tiny", *CUT]), ops=False)
    shown = {row.slot: row.target.rpartition(".")[2] for row in told.rows}
    assert (shown["stages.0.program"], shown["stages.1.program"]) == ("TpuProgram", "EagerProgram")
    assert tokens(*HYBRID, *CUT) == tokens("platform=cpu")


def test_the_conformance_suite_judges_both_stages() -> None:
    subject = Subject(HYBRID)
    cases = ("golden/test_tokens[tied-float32]", "graph/test_an_override_runs[attention]")
    try:
        report = run(subject, only=cases, quiet=True)
    finally:
        subject.close()
    found = {case.id: case.outcome for check in report.checks for case in check.cases}
    assert found == dict.fromkeys(cases, "pass")
    assert report.components["stages.0.attention"].endswith(".TpuAttention")
    assert report.components["stages.1.attention"].endswith(".PagedAttention")
