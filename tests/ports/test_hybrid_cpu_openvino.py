"""One model on two platforms: the tokens of either alone, and choices that reach both or one."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_di import LLM, SamplingParams
from vllm_di.conformance.run import run
from vllm_di.conformance.subject import Subject
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROMPTS = ["a", "hello world", "x" * 70]
HYBRID = "platform=hybrid_cpu_openvino"
CUT = ["stages.0.model.layers=[0,1]", "stages.1.model.layers=[1,null]"]


def tokens(*overrides: str) -> list[list[int]]:
    with LLM("tiny", overrides=["model.dtype=float32", *overrides]) as llm:
        return [answer.outputs[0].token_ids for answer in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def want() -> list[list[int]]:
    return tokens("platform=cpu")


def test_the_tokens_are_those_of_either_platform(want: list[list[int]]) -> None:
    assert tokens("platform=openvino") == want
    assert tokens(HYBRID, *CUT) == want


@pytest.mark.parametrize(
    ("overrides", "classes"),
    [
        ((), ("PagedAttention", "OpenVinoAttention")),
        (("attention=sdpa",), ("SdpaAttention", "SdpaAttention")),
        (("stages.1.attention=sdpa",), ("PagedAttention", "SdpaAttention")),
        (("stages.0.attention=hybrid",), ("HybridAttention", "OpenVinoAttention")),
    ],
)
def test_choices_reach_both_stages_or_one(
    overrides: tuple[str, ...], classes: tuple[str, str], want: list[list[int]]
) -> None:
    told: Any = explain(assemble([HYBRID, "model=tiny", *CUT, *overrides]), ops=False)
    shown = {row.slot: row.target.rpartition(".")[2] for row in told.rows}
    assert (shown["stages.0.attention"], shown["stages.1.attention"]) == classes
    assert shown["stages.0.program"] == "EagerProgram"
    assert shown["stages.1.program"] == "OpenVinoProgram"
    if overrides:
        assert tokens(HYBRID, *CUT, *overrides) == want


@pytest.mark.slow
def test_smollm2_knows_the_capital_on_both() -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answers = []
    for platform in ("platform=cpu", "platform=openvino", HYBRID):
        with LLM("smollm2", overrides=[platform, "model.dtype=float32"]) as llm:
            answers.append(llm.chat(question, SamplingParams(temperature=0, max_tokens=24))[0])
    texts = [answer.outputs[0].text for answer in answers]
    assert "Paris" in texts[0] and texts[1:] == texts[:1] * 2
    assert len({tuple(answer.outputs[0].token_ids) for answer in answers}) == 1


def test_the_conformance_suite_judges_all_stages() -> None:
    subject = Subject(["platform=hybrid_cpu_openvino"])
    cases = (
        "golden/test_tokens[tied-float32]",
        "graph/test_an_override_runs[attention]",
        "graph/test_sdpa_is_honoured",
        "pooling/test_vectors[mean]",
    )
    try:
        report = run(subject, only=cases, quiet=True)
    finally:
        subject.close()
    found = {case.id: case.outcome for check in report.checks for case in check.cases}
    assert found == dict.fromkeys(cases, "pass")
    assert report.components["stages.0.attention"].endswith(".PagedAttention")
    assert report.components["stages.1.attention"].endswith(".OpenVinoAttention")
