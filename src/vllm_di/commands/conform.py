"""``vllm-di conform platform=X``: the conformance suite on a platform, and its report."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_di.commands.arguments import Arguments, UsageError, engine, no_words
from vllm_di.commands.table import print_table
from vllm_di.errors import VllmDiError, nearest

if TYPE_CHECKING:
    from vllm_di.conformance.report import Report

LEVELS = ("contract", "compile", "runtime")
MOST_OF_A_REASON = 90
"""Characters of it in the table. A longer one stands below, if something is to be installed."""


def run(arguments: Arguments) -> int:
    """Exit status 1 when a check failed, 130 when the run was interrupted: its report is written
    all the same."""
    no_words(arguments)
    if engine(arguments):
        from vllm_di.commands.vllm import conform

        return conform(arguments)
    if "--list" in arguments.switches:
        from vllm_di.conformance.catalog import CHECKS

        rows = [[str(c.number), c.name, c.required, c.title] for c in CHECKS]
        print_table(["#", "name", "from level", "check"], rows)
        return 0
    level = arguments.options.get("--level", "runtime")
    if level not in LEVELS:
        raise UsageError(f"--level {level}: choose {', '.join(LEVELS)}{nearest(level, LEVELS)}")
    try:
        import pytest  # noqa: F401 - the suite needs it; it is no dependency of the engine
    except ModuleNotFoundError:
        raise VllmDiError(
            "conform needs pytest, which is not installed: pip install 'vllm-di[conformance]'"
        ) from None
    from vllm_di.conformance import run as suite
    from vllm_di.conformance.report import read_waivers
    from vllm_di.conformance.subject import Subject

    waivers = []
    if file := arguments.options.get("--waivers"):
        waivers = read_waivers(Path(file), datetime.datetime.now(datetime.UTC).date())
    only = [name for name in arguments.options.get("--only", "").split(" ") if name]
    subject = Subject(
        arguments.overrides,
        form="full" if "--full" in arguments.switches else "short",
        seed=arguments.number("--seed", suite.SEED),
        config_dirs=arguments.config_dirs,
    )
    interrupted = False
    try:
        report = suite.run(subject, level=level, only=only, waivers=waivers)
    except suite.Interrupted as stopped:
        report, interrupted = stopped.report, True
    finally:
        subject.close()
    for option, write in (("--json", report.write), ("--junit", report.write_junit)):
        if path := arguments.options.get(option):
            write(Path(path))
    _print(report)
    if interrupted:
        print("interrupted: the report holds the cases until then", file=sys.stderr)
        return 130
    return 1 if report.failed else 0


def _print(report: Report) -> None:
    rows, cut = [], []
    for check in report.checks:
        reasons = {case.message for case in check.cases if case.outcome == check.outcome}
        why = "" if check.outcome in ("pass", "fail") else "; ".join(sorted(reasons))
        count = f"{len(check.cases)} cases, {check.seconds:.1f} s"
        rows.append([str(check.number), check.title, check.outcome, count, why[:MOST_OF_A_REASON]])
        if check.outcome == "not-run":
            cut += [reason for reason in sorted(reasons) if len(reason) > MOST_OF_A_REASON]
    print()
    print_table(["#", "check", "outcome", "", "why"], rows)
    for reason in dict.fromkeys(cut):
        print(f"\nNOT RUN: {reason}")
    for case in report.failed:
        print(f"\nFAILED {case.id}: {case.message.splitlines()[0]}\n  replay: {case.replay}")
    simulated = ", on a simulated device" if report.simulated else ""
    part = " (a part of the suite gives no level)" if report.partial else ""
    print(
        f"\n{report.platform}: level {report.level}{part}, {report.form} form{simulated}, "
        f"{report.seconds:.0f} s, interfaces {report.interface_version}, seed {report.seed}"
    )
