"""The pytest plugin: gives the checks their subject and turns what they do into outcomes.

    pytest -p vllm_di.conformance.plugin --conform platform=X --pyargs vllm_di.conformance.checks

``vllm-di conform`` does the same and writes the report.
"""

from __future__ import annotations

import shlex
from collections.abc import Generator, Sequence
from typing import Any

import pytest

from vllm_di.conformance.catalog import BY_NAME, CHECKS
from vllm_di.conformance.compiling import compile_cases
from vllm_di.conformance.outcomes import NotDeclared, NotRun, Record
from vllm_di.conformance.report import Case, CheckResult, Outcome, Waiver, together
from vllm_di.conformance.subject import Subject
from vllm_di.errors import PortError, VllmDiError

LETTERS = {"not-declared": "d", "not-run": "n", "waived": "w"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--conform", action="append", default=[], metavar="OVERRIDE", help="subject")


def pytest_configure(config: pytest.Config) -> None:
    """Under plain pytest the overrides come as options; ``run.py`` registers a Conformance of its
    own."""
    if overrides := config.getoption("--conform"):
        subject = Subject(overrides)
        config.add_cleanup(subject.close)
        config.pluginmanager.register(Conformance(subject))


class Conformance:
    """One run of checks on one subject."""

    def __init__(
        self,
        subject: Subject,
        *,
        checks: Sequence[str] = tuple(BY_NAME),
        only: Sequence[str] = (),
        waivers: Sequence[Waiver] = (),
    ) -> None:
        self._subject, self._only = subject, only
        self._checks, self.waivers = set(checks), waivers
        self._records: dict[str, Record] = {}
        self.cases: list[tuple[str, Case]] = []
        """(name of its check, case), as they ended."""
        self.errors: list[str] = []
        """What failed before a test began."""

    def results(self) -> list[CheckResult]:
        """The checks that ran, in order."""
        found = []
        for check in CHECKS:
            cases = [case for name, case in self.cases if name == check.name]
            if cases or check.name in self._checks:
                found.append(
                    CheckResult(
                        number=check.number,
                        name=check.name,
                        title=check.title,
                        required=check.required,
                        outcome=together(case.outcome for case in cases),
                        cases=cases,
                    )
                )
        return found

    # -- pytest's hooks -----------------------------------------------------------------------

    @pytest.fixture
    def subject(self) -> Subject:
        """The platform under test."""
        return self._subject

    @pytest.fixture
    def record(self, request: pytest.FixtureRequest) -> Record:
        """Facts for the report."""
        self._records[request.node.nodeid] = found = Record()
        return found

    @pytest.fixture
    def results_so_far(self) -> Conformance:
        """The run itself, for the check of the report."""
        return self

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """A test with the argument ``declared_quantization`` runs for each that is declared."""
        if "declared_quantization" in metafunc.fixturenames:
            try:
                options = self._subject.declared.quantization
            except VllmDiError:  # the manifest's own check says so
                options = ()
            metafunc.parametrize("declared_quantization", options or ("none",))
        if "compiled_part" in metafunc.fixturenames:
            metafunc.parametrize(("target", "compiled_part"), compile_cases(self._subject))

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        place = {name: index for index, name in enumerate(BY_NAME)}
        kept = [i for i in items if _check_of(i) in self._checks and self._wanted(i)]
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = sorted(kept, key=lambda item: place[_check_of(item)])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(f"{report.nodeid}: {report.longreprtext}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        error = call.excinfo.value if call.excinfo else None
        # the test's own call tells its outcome; before and after it only a failure counts
        if call.when == "call" or error is not None:
            outcome, message = self._outcome(item, error, report)
            self._add(item, outcome, message, call.duration)
            if outcome != "fail":
                # a fixture that could not be had: the test is not to be called without it
                report.outcome = "passed" if call.when == "call" else "skipped"
                report.longrepr = None
            report.conformance = outcome  # type: ignore[attr-defined]
        return report

    def pytest_report_teststatus(self, report: pytest.TestReport) -> Any:
        outcome = getattr(report, "conformance", None)
        if outcome in LETTERS:
            return outcome, LETTERS[outcome], outcome.upper()
        return None

    # -- inside -------------------------------------------------------------------------------

    def _wanted(self, item: pytest.Item) -> bool:
        case = case_id(item)
        return not self._only or any(
            case == one or case.startswith((f"{one}/", f"{one}[")) for one in self._only
        )

    def _outcome(
        self, item: pytest.Item, error: BaseException | None, report: pytest.TestReport
    ) -> tuple[Outcome, str]:
        if error is None:
            return "pass", ""
        if isinstance(error, NotDeclared):
            return "not-declared", str(error)
        if isinstance(error, NotRun):
            return "not-run", str(error)
        if isinstance(error, PortError) and (absent := self._subject.lacks_driver):
            return "not-run", absent
        if isinstance(error, pytest.skip.Exception):
            return "fail", f"the test was skipped, which is no outcome: {error}"
        message = f"{type(error).__name__}: {error}".strip()
        case = case_id(item)
        for waiver in self.waivers:
            if waiver.id in (case, case.split("[")[0], _check_of(item)):
                return "waived", f"{waiver.owner}, until {waiver.expires}: {waiver.reason}"
        return "fail", f"{message}\n{report.longreprtext}"[:8000]

    def _add(self, item: pytest.Item, outcome: Outcome, message: str, seconds: float) -> None:
        record = self._records.get(item.nodeid, Record())
        case = Case(
            id=case_id(item),
            outcome=outcome,
            seconds=round(seconds, 3),
            message=message,
            features=record.features,
            figures=record.figures,
        )
        if outcome == "fail":
            case.replay = self.replay(case.id)
        self.cases = [(n, c) for n, c in self.cases if c.id != case.id]
        self.cases.append((_check_of(item), case))

    def replay(self, case: str) -> str:
        """The command that runs one case again."""
        subject = self._subject
        words = ["vllm-di", "conform", *subject.overrides, "--only", case]
        words += ["--seed", str(subject.seed)]
        words += [word for folder in subject.config_dirs for word in ("--config-dir", folder)]
        return shlex.join([*words, *(["--full"] if subject.full else [])])


def case_id(item: pytest.Item) -> str:
    """``CHECK/TEST[PARAMETERS]``"""
    return f"{_check_of(item)}/{item.name}"


def _check_of(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("test_")
