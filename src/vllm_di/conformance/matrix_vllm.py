"""What the support matrix says of vLLM: which of its versions a platform's parts run in, from
recorded reports of ``vllm-di conform --engine vllm``."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from vllm_di.conformance.report import expires, has_expired
from vllm_di.report_file import ReportError
from vllm_di.vllm.conformance.report import Report

FEATURE = "runs in vLLM"
"""The row of the features' table."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded run in one version."""

    file: str
    vllm: str
    platform: str
    ran: datetime.date
    expires: datetime.date
    expired: bool
    device: str
    versions: dict[str, str]
    cases: dict[str, Literal["pass", "fail"]]

    @property
    def holds(self) -> bool:
        """Whether it is evidence that the platform's parts run in this version."""
        return not self.expired and set(self.cases.values()) == {"pass"}


def build(files: Iterable[Path], version: str, on: datetime.date) -> list[Run]:
    """The runs in report ``files``, by version of vLLM, for vllm-di ``version``. Raises ReportError
    for a file that is no report, or one of a part of the suite."""
    found = []
    for file in files:
        report = Report.read(file)
        if report.partial:
            raise ReportError(f"{file}: a part of the suite was run, which is no evidence")
        ran = report.started.date()
        run = Run(
            file=str(file),
            vllm=report.vllm.partition("+")[0],
            platform=report.platform,
            ran=ran,
            expires=expires(ran),
            expired=has_expired(ran, report.versions.get("vllm-di", version), version, on),
            device=report.device,
            versions=report.versions,
            cases={case.name: case.outcome for case in report.cases},
        )
        found.append(run)
    return sorted(found, key=lambda run: ([int(n) for n in run.vllm.split(".")], run.platform))


def runs_in(runs: Sequence[Run], platform: str) -> list[Run]:
    """Those that show that a platform's parts run in a version of vLLM."""
    return [run for run in runs if run.platform == platform and run.holds]


HEAD = ("vLLM", "platform", "on", "ran", "valid until", "versions", "failed", "report")


def run_rows(runs: Sequence[Run], shown: Sequence[str]) -> list[list[str]]:
    """One for each run; ``shown`` are the packages whose versions are named."""
    rows = []
    for run in runs:
        failed = sum(outcome == "fail" for outcome in run.cases.values())
        until = f"{run.expires.isoformat()}{' (expired)' if run.expired else ''}"
        versions = ", ".join(f"{n} {run.versions[n]}" for n in shown if n in run.versions)
        row = [run.vllm, run.platform, run.device, run.ran.isoformat(), until, versions]
        rows.append([*row, f"{failed} of {len(run.cases)}", Path(run.file).name])
    return rows


def case_rows(runs: Sequence[Run]) -> list[list[str]]:
    """One for each case, with a cell for each run."""
    names = {name: None for run in runs for name in run.cases}
    words = {"pass": "pass", "fail": "FAILS"}
    return [[name, *(words.get(run.cases.get(name, ""), "-") for run in runs)] for name in names]
