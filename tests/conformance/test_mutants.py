"""The suite finds what it is there to find: every mutant dies, of the right cause, at the hands of
its named killers; and without a mutant the same cases pass."""

from __future__ import annotations

import re

import pytest
from tests.conformance.mutants.catalog import BASE, MUTANTS, Mutant

from vllm_di.conformance.report import Report
from vllm_di.conformance.run import run
from vllm_di.conformance.subject import Subject

LEAST_MUTANTS = 40
CROSS = (
    *("manifest", "config", "device", "ops", "prefill", "decode", "chunks", "kv", "sampler"),
    *("weights", "golden", "logprobs", "batching", "graphs", "cache", "memory"),
)
"""Checks that every mutant meets in the full cross."""


def judged(
    overrides: tuple[str, ...], only: tuple[str, ...], config_dirs: tuple[str, ...] = ()
) -> Report:
    subject = Subject(overrides, config_dirs=config_dirs)
    try:
        return run(subject, only=only, quiet=True)
    finally:
        subject.close()


def killers_of(report: Report) -> dict[str, str]:
    """Case to what it said, of those that failed."""
    return {case.id: case.message for case in report.failed}


def test_there_are_enough() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= LEAST_MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_its_killers_kill_it(mutant: Mutant) -> None:
    failed = killers_of(
        judged((*mutant.base, *mutant.overrides), mutant.killers, mutant.config_dirs)
    )
    for killer in mutant.killers:
        assert killer in failed, f"{mutant.name} survives {killer}"
        assert re.search(mutant.reason, failed[killer], re.DOTALL), failed[killer]


def test_without_a_mutant_all_killers_pass() -> None:
    not_base = {"manifest/test_it_has_the_ops_that_it_claims", "graphs/test_replay_equals_eager"}
    killers = {k for mutant in MUTANTS if not mutant.config_dirs for k in mutant.killers}
    report = judged(BASE, tuple(sorted(killers)))
    assert not report.failed, report.failed[0].message
    ran = {case.id: case.outcome for check in report.checks for case in check.cases}
    assert set(ran) == killers
    assert {k for k, outcome in ran.items() if outcome != "pass"} <= not_base


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_full_cross(mutant: Mutant) -> None:
    """Against every check that runs in this process: its killers are among those that fail."""
    only = tuple(dict.fromkeys([*CROSS, *mutant.killers]))
    failed = killers_of(judged((*mutant.base, *mutant.overrides), only, mutant.config_dirs))
    assert set(mutant.killers) <= set(failed), f"killed by {sorted(failed)}"
