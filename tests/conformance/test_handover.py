"""The check of a hand-over: on platforms of roles, and where there is nothing to judge."""

from __future__ import annotations

import re

import pytest
from tests.conformance.mutants.catalog import BASE

from vllm_di.conformance.report import Case
from vllm_di.conformance.run import run
from vllm_di.conformance.subject import Subject
from vllm_di.errors import ConfigError

VALUES = "handover/test_values[float32-float32-gives]"


def cases(overrides: tuple[str, ...], *only: str) -> dict[str, Case]:
    subject = Subject(overrides)
    try:
        report = run(subject, only=only, quiet=True)
    finally:
        subject.close()
    return {case.id: case for check in report.checks for case in check.cases}


def test_a_platform_of_roles_is_judged_between_them() -> None:
    tokens = "handover/test_tokens[gqa-{}]"
    found = cases(
        ("platform=split_cpu_cpu", "ops=torch", "decode.kv_layout.block_size=48"),
        *(VALUES, tokens.format("gives"), tokens.format("takes")),
    )
    assert {id_: case.outcome for id_, case in found.items()} == {
        VALUES: "pass",
        tokens.format("gives"): "pass",
        tokens.format("takes"): "not-declared",  # prompts run on one side alone
    }


@pytest.mark.parametrize("only", [(), ("golden",), ("handover", "golden")])
def test_its_roles_are_judged_by_themselves(only: tuple[str, ...]) -> None:
    subject = Subject(("platform=split_cpu_openvino", "decode.attention=sdpa"))
    each = "vllm-di conform platform=openvino worker=handover model.dtype=float32 attention=sdpa"
    whole = "conform platform=split_cpu_openvino decode.attention=sdpa --only handover"
    with pytest.raises(ConfigError, match="roles prefill, decode") as refused:
        run(subject, only=only, quiet=True)
    assert re.search(f"^  {each}$", str(refused.value), re.MULTILINE)
    assert whole in str(refused.value)


def test_a_cache_that_cannot_be_written_is_not_judged() -> None:
    copies = "program._target_=tests.conformance.mutants.handover.CopiedCaches"
    [case] = cases((*BASE, copies), VALUES).values()
    assert case.outcome == "not-declared" and "gives copies of its cache" in case.message
