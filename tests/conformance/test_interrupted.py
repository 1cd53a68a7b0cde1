"""A run of the suite that somebody ends: what was found until then is not lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_di import cli
from vllm_di.conformance import run as suite
from vllm_di.conformance.report import Report
from vllm_di.conformance.subject import Subject


class Impatient(Subject):
    """Somebody presses Ctrl-C when the second case opens its parts."""

    left = 1

    def parts(self, *slots: str, **more: Any) -> Any:
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return super().parts(*slots, **more)


def test_the_report_holds_the_cases_until_then() -> None:
    subject = Impatient(["platform=cpu", "device.threads=1"])
    try:
        with pytest.raises(suite.Interrupted) as caught:
            suite.run(subject, only=["device"], quiet=True)
    finally:
        subject.close()
    report = caught.value.report
    assert report.partial and report.level == "none"
    assert len(report.checks) == 1 and len(report.checks[0].cases) == 1


def test_the_command_writes_it_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(subject: Subject, **more: Any) -> Report:
        found = suite_run(subject, only=["device/test_dtypes"], quiet=True)
        raise suite.Interrupted(found)

    suite_run = suite.run
    monkeypatch.setattr(suite, "run", stopped)
    path = tmp_path / "report.json"
    with pytest.raises(SystemExit, match="130"):
        cli.main(["conform", "platform=cpu", "--json", str(path)])
    assert Report.read(path).platform == "cpu"
    assert "interrupted" in capsys.readouterr().err
