"""What one run of the suite found, as data: written by ``vllm-di conform``, read by ``vllm-di
matrix``."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import msgspec

from vllm_di.containers import manifest
from vllm_di.report_file import ReportError, ReportFile

Outcome = Literal["pass", "fail", "waived", "not-declared", "not-run"]
"""``not-declared``: the port does not claim it. ``not-run``: a driver or download is absent, so
that the level falls. There is no other: a crash is a fail."""

Reached = manifest.Level | Literal["none"]
"""What one run shows; ``none`` when not even the first checks hold, or only some were run."""

Required = Literal["declared", "contract", "compile", "runtime"]
"""The lowest level that requires a check. ``declared`` are checks 1 to 5."""

WORST_FIRST: tuple[Outcome, ...] = ("fail", "not-run", "waived", "pass", "not-declared")
"""The outcome of a check whose cases differ: the first of these that occurs."""

VALID = datetime.timedelta(days=180)
MINORS = 2
"""For so long, and for so many minors of vllm-di, a report counts."""

LONGEST_WAIVER = datetime.timedelta(days=90)


class Waiver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A failure that a named owner accepts until a date."""

    id: str
    """Name of a check (``sampler``) or id of a case (``sampler/test_greedy[float32]``)."""
    owner: str
    expires: datetime.date
    reason: str


class Case(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One test of a check."""

    id: str
    """``CHECK/TEST[PARAMETERS]``: what ``--only`` takes."""
    outcome: Outcome
    seconds: float
    message: str = ""
    """Why it failed, is not declared or was not run."""
    replay: str = ""
    """The command that runs this case alone, for one that failed."""
    features: list[str] = []
    """Rows of the matrix that it proves: ``float16``, ``sliding window``."""
    figures: dict[str, Any] = {}
    """What it measured or counted."""


class CheckResult(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One of the checks, with its cases."""

    number: int
    name: str
    title: str
    required: Required
    outcome: Outcome
    cases: list[Case]

    @property
    def seconds(self) -> float:
        return sum(case.seconds for case in self.cases)


class Report(ReportFile, kw_only=True):
    """One run."""

    format: int = 1
    platform: str
    level: Reached
    partial: bool
    form: Literal["short", "full"]
    """Of the long checks (lifecycle, memory bound, soak, ...)."""
    simulated: bool
    """Whether the device was a simulated one: never runtime-tested."""
    started: datetime.datetime
    seconds: float
    overrides: list[str]
    config_hash: str
    interface_version: str
    """Of the interfaces that the suite ran against."""
    port_interface: str
    """That the port was written for."""
    seed: int
    device: str
    versions: dict[str, str]
    """Package to version; ``commit`` is the source tree's, with ``+`` when it was changed."""
    capabilities: dict[str, Any]
    """As the platform's manifest declares them."""
    components: dict[str, str]
    """Slot to the class that filled it."""
    waivers: list[Waiver]
    checks: list[CheckResult]

    @property
    def failed(self) -> list[Case]:
        return [c for check in self.checks for c in check.cases if c.outcome == "fail"]

    def features(self) -> dict[str, Outcome]:
        """Feature to its outcome over all cases that speak for it."""
        found: dict[str, list[Outcome]] = {}
        for check in self.checks:
            for case in check.cases:
                for feature in case.features:
                    found.setdefault(feature, []).append(case.outcome)
        return {feature: together(outcomes) for feature, outcomes in sorted(found.items())}

    def write_junit(self, path: Path) -> None:
        """For CI: what is neither pass nor fail stands there as skipped, with the reason."""
        root = ElementTree.Element("testsuites", name=f"conformance of {self.platform}")
        for check in self.checks:
            suite = ElementTree.SubElement(
                root,
                "testsuite",
                name=f"{check.number} {check.name}",
                tests=str(len(check.cases)),
                failures=str(sum(c.outcome == "fail" for c in check.cases)),
                time=f"{check.seconds:.3f}",
            )
            for case in check.cases:
                item = ElementTree.SubElement(
                    suite,
                    "testcase",
                    classname=check.name,
                    name=case.id,
                    time=f"{case.seconds:.3f}",
                )
                if case.outcome == "fail":
                    failure = ElementTree.SubElement(item, "failure")
                    failure.text = f"{case.message}\n\nreplay: {case.replay}"
                elif case.outcome != "pass":
                    message = f"{case.outcome}: {case.message}"
                    ElementTree.SubElement(item, "skipped", message=message)
        path.parent.mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def expires(ran: datetime.date) -> datetime.date:
    """The last day on which a run counts."""
    return ran + VALID


def has_expired(ran: datetime.date, reported: str, version: str, on: datetime.date) -> bool:
    """Whether a run with vllm-di ``reported`` counts no longer for vllm-di ``version``."""
    return on > expires(ran) or _minors(reported, version) > MINORS


def _minors(old: str, new: str) -> int:
    """How many minors ``new`` is ahead; many where the major differs."""
    try:
        (a, b), (c, d) = (tuple(map(int, v.split(".")[:2])) for v in (old, new))
    except ValueError:  # a report may say anything
        return 100
    return d - b if a == c else 100


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """The outcome of several cases as one; of none at all: not-run."""
    there = set(outcomes)
    return next((outcome for outcome in WORST_FIRST if outcome in there), "not-run")


def level_of(checks: Sequence[CheckResult], *, partial: bool, simulated: bool) -> Reached:
    """The highest level whose checks all hold. ``compile-checked`` is given where the compile check
    was run and passed: a platform that names no targets has nothing that compiles. No run gives
    ``hardware-tested``, which needs evidence beyond the suite."""
    if partial:
        return "none"
    if any(c.required == "compile" and c.outcome == "not-declared" for c in checks):
        checks = [check for check in checks if check.required != "compile"]
    holds = {"pass", "waived", "not-declared"}
    reached: Reached = "none"
    steps: tuple[tuple[Required, manifest.Level], ...] = (
        ("declared", "declared"),
        ("contract", "contract-tested"),
        ("compile", "compile-checked"),
        ("runtime", "runtime-tested"),
    )
    for required, level in steps:
        of_step = [check for check in checks if check.required == required]
        if required == "compile" and not of_step:
            continue  # it was not asked for
        if not of_step or not all(check.outcome in holds for check in of_step):
            break
        if simulated and level == "runtime-tested":
            break
        reached = level
    return reached


def read_waivers(path: Path, today: datetime.date) -> list[Waiver]:
    """A YAML list of waivers that are in force. Raises ReportError for one that runs longer than
    90 days."""
    try:
        waivers = msgspec.yaml.decode(path.read_bytes(), type=list[Waiver])
    except (OSError, msgspec.DecodeError) as error:
        raise ReportError(f"{path}: {error}") from error
    for waiver in waivers:
        if waiver.expires - today > LONGEST_WAIVER:
            raise ReportError(
                f"{path}: {waiver.id}: expires {waiver.expires}, in more than "
                f"{LONGEST_WAIVER.days} days"
            )
    return [waiver for waiver in waivers if waiver.expires >= today]
