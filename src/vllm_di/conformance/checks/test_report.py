"""What the run has found so far makes a whole report, and every failure a command."""

from __future__ import annotations

import datetime
import itertools
import shlex
from pathlib import Path

import msgspec

from vllm_di.conformance.plugin import Conformance
from vllm_di.conformance.report import Report
from vllm_di.conformance.run import report
from vllm_di.conformance.subject import Subject


def test_the_report_is_whole(subject: Subject, results_so_far: Conformance, tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    found = report(subject, results_so_far, now, 1.0, partial=True)
    found.write(tmp_path / "report.json")
    again = Report.read(tmp_path / "report.json")
    assert msgspec.json.encode(again) == msgspec.json.encode(found)
    found.write_junit(tmp_path / "junit.xml")
    assert found.platform == subject.platform
    assert len(found.config_hash) == 64
    assert found.seed == subject.seed
    for name in ("vllm-di", "python", "torch"):
        assert found.versions[name] not in ("", "absent"), name
    assert all(found.components.values())


def test_a_failure_can_be_replayed(subject: Subject, results_so_far: Conformance) -> None:
    """The printed command names the case and all that the run was given."""
    command = shlex.split(results_so_far.replay("ops/test_op[linear-float32]"))
    assert command[:2] == ["vllm-di", "conform"]
    assert command[2 : 2 + len(subject.overrides)] == subject.overrides
    flags = dict(itertools.pairwise(command))
    assert flags["--only"] == "ops/test_op[linear-float32]"
    assert flags["--seed"] == str(subject.seed)
    assert ("--full" in command) == subject.full
