"""The suite finds the faults that a compiled step with a donated cache invites."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from tests.ports.tpu.mutants import MUTANTS, Mutant

from vllm_di.conformance.report import Report
from vllm_di.conformance.run import run
from vllm_di.conformance.subject import Subject

pytest.importorskip("jax", reason="platform=tpu was not tested: pip install 'vllm-di[tpu]'")

FEW = ("platform=tpu", "device.backend=cpu", "trust=[tests]", "shapes.sizes=[16,512]")
"""Two programs for steps instead of five."""


def judged(only: Sequence[str], *overrides: str) -> Report:
    subject = Subject([*FEW, *overrides])
    try:
        return run(subject, only=only, quiet=True)
    finally:
        subject.close()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.cls.__name__)
def test_its_killer_kills_it(mutant: Mutant) -> None:
    (failed,) = judged([mutant.killer], mutant.override).failed
    assert failed.id == mutant.killer
    assert re.search(mutant.reason, failed.message, re.DOTALL), failed.message


def test_without_a_mutant_the_killers_pass() -> None:
    killers = {mutant.killer for mutant in MUTANTS}
    report = judged(sorted(killers))
    found = {case.id: case.outcome for check in report.checks for case in check.cases}
    assert found == dict.fromkeys(killers, "pass")
