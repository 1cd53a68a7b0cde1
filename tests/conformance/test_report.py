"""Reports: outcomes of several cases, levels, waivers, files."""

from __future__ import annotations

import datetime
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vllm_di.conformance.report import (
    Case,
    CheckResult,
    Outcome,
    Reached,
    Report,
    Required,
    level_of,
    read_waivers,
    together,
)
from vllm_di.report_file import ReportError

TODAY = datetime.date(2026, 1, 31)


def check(required: Required, outcome: Outcome, features: list[str] | None = None) -> CheckResult:
    case = Case(
        id=f"{required}/test_it", outcome=outcome, seconds=0.5, message="x", features=features or []
    )
    return CheckResult(
        number=1, name=required, title="t", required=required, outcome=outcome, cases=[case]
    )


def report(checks: list[CheckResult]) -> Report:
    return Report(
        platform="sim",
        level="declared",
        partial=False,
        form="short",
        simulated=True,
        started=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        seconds=1.5,
        overrides=["platform=sim"],
        config_hash="0",
        interface_version="1.0",
        port_interface="1.0",
        seed=1,
        device="cpu",
        versions={},
        capabilities={},
        components={},
        waivers=[],
        checks=checks,
    )


def test_a_check_is_as_good_as_its_worst_case() -> None:
    assert together(["pass", "not-declared"]) == "pass"
    assert together(["pass", "waived"]) == "waived"
    assert together(["pass", "not-run", "waived"]) == "not-run"
    assert together(["not-run", "fail"]) == "fail"
    assert together(["not-declared"]) == "not-declared"
    assert together([]) == "not-run"


@pytest.mark.parametrize(
    ("outcomes", "level"),
    [
        (("pass", "pass", "pass"), "runtime-tested"),
        (("pass", "waived", "not-declared"), "runtime-tested"),
        (("pass", "pass", "not-run"), "contract-tested"),
        (("pass", "pass", "fail"), "contract-tested"),
        (("pass", "not-run", "pass"), "declared"),
        (("fail", "pass", "pass"), "none"),
    ],
)
def test_the_level_is_that_of_the_checks_that_hold(
    outcomes: tuple[Outcome, Outcome, Outcome], level: Reached
) -> None:
    required: tuple[Required, ...] = ("declared", "contract", "runtime")
    checks = [check(r, o) for r, o in zip(required, outcomes, strict=True)]
    assert level_of(checks, partial=False, simulated=False) == level
    assert level_of(checks, partial=True, simulated=False) == "none"


def test_a_simulated_device_never_gives_more_than_contract_tested() -> None:
    checks = [check("declared", "pass"), check("contract", "pass"), check("runtime", "pass")]
    assert level_of(checks, partial=False, simulated=True) == "contract-tested"


def test_what_compiles_lies_between_contract_and_runtime() -> None:
    below = [check("declared", "pass"), check("contract", "pass")]
    passed, failed = check("compile", "pass"), check("compile", "fail")
    assert level_of([*below, passed], partial=False, simulated=True) == "compile-checked"
    assert level_of([*below, failed], partial=False, simulated=True) == "contract-tested"
    nothing = check("compile", "not-declared")
    assert level_of([*below, nothing], partial=False, simulated=True) == "contract-tested"
    alone = [check("declared", "pass"), check("contract", "not-run"), passed]
    assert level_of(alone, partial=False, simulated=False) == "declared"
    runtime = check("runtime", "pass")
    assert level_of([*below, failed, runtime], partial=False, simulated=False) == "contract-tested"
    assert level_of([*below, nothing, runtime], partial=False, simulated=False) == "runtime-tested"


def test_a_run_without_runtime_checks_stops_at_contract() -> None:
    checks = [check("declared", "pass"), check("contract", "pass")]
    assert level_of(checks, partial=False, simulated=False) == "contract-tested"


def test_files(tmp_path: Path) -> None:
    checks = [check("declared", "pass", ["float16"]), check("contract", "fail", ["float16", "moe"])]
    written = report(checks)
    written.write(tmp_path / "deep" / "sim.json")
    assert Report.read(tmp_path / "deep" / "sim.json") == written
    assert written.features() == {"float16": "fail", "moe": "fail"}
    assert [case.id for case in written.failed] == ["contract/test_it"]
    written.write_junit(tmp_path / "junit.xml")
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [s.get("failures") for s in root] == ["0", "1"]


def test_a_broken_report_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format": 1}')
    with pytest.raises(ReportError, match=r"x\.json: .*missing required field"):
        Report.read(tmp_path / "x.json")


def test_waivers_expire(tmp_path: Path) -> None:
    path = tmp_path / "waivers.yaml"
    text = "- {id: sampler, owner: ada, expires: %s, reason: vendor bug 7}\n"
    path.write_text(text % "2026-03-01")
    assert [w.owner for w in read_waivers(path, TODAY)] == ["ada"]
    path.write_text(text % "2026-01-30")
    assert read_waivers(path, TODAY) == []
    path.write_text(text % "2026-06-01")
    with pytest.raises(ReportError, match="in more than 90 days"):
        read_waivers(path, TODAY)
