"""``python -m benchmarks.gpu``: all parts within a budget of seconds."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.parts import Part, parts
from benchmarks.gpu.processes import GRACE, Outcome

LEAST = 5.0
"""Seconds below which a part is not begun."""


class Report:
    """What is known, on disk after each job."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.parts: dict[str, dict[str, Any]] = {}

    def begin(self, part: Part, limit: float) -> None:
        self.parts[part.name] = {"limit": round(limit, 1), "jobs": {}}

    def add(self, part: Part, outcome: Outcome) -> None:
        self.parts[part.name]["jobs"][outcome.name] = asdict(outcome)
        words = f"{part.name}: {outcome.name}: {outcome.status}, {outcome.seconds:.0f} s"
        wrong = failed(outcome.rows)
        if outcome.rows:
            words += f", {len(outcome.rows)} rows, {len(wrong)} failed"
        print(words, flush=True)
        for row in wrong[:3]:
            why = str(row.get("error") or row.get("note") or row)
            print(f"    {row.get('name')}: {why[:300]}", flush=True)
        if outcome.status == "failed" and not outcome.rows:
            print("    " + outcome.tail[-1200:].replace("\n", "\n    "), flush=True)
        self.write()

    def skip(self, part: Part) -> None:
        self.parts[part.name] = {"limit": 0, "jobs": {}}
        for job in part.jobs:
            self.add(part, Outcome(job.name))

    def write(self) -> None:
        if self._path is None:
            return
        whole = self._path.with_suffix(".part")
        whole.write_text(json.dumps({"parts": self.parts}, indent=1))
        whole.replace(self._path)

    @property
    def wrong(self) -> list[str]:
        """Jobs that did not pass, and targets that were missed."""
        found = []
        for part in self.parts.values():
            for name, job in part["jobs"].items():
                if job["status"] != "passed":
                    found.append(f"{name}: {job['status']}")
                found += [
                    f"{row['name']}: {row['value']:.3g}, below {row['target']:g}"
                    for row in job["rows"]
                    if row.get("target") and row["value"] < row["target"]
                ]
        return found


def failed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("passed") is False]


def run(listed: Sequence[Part], budget: float, workers: int, logs: Path, path: Path | None) -> int:
    """Exit status 1 when a job did not pass or a target was missed."""
    deadline, report = time.monotonic() + budget, Report(path)
    usable = True
    for part in listed:
        keep = part.keep if part is not listed[-1] else 0.0
        left = deadline - time.monotonic() - keep - GRACE
        limit = min(part.limit, left)
        if limit < LEAST or not usable:
            report.skip(part)
            continue
        print(f"{part.name}: up to {limit:.0f} s", flush=True)
        report.begin(part, limit)
        side_by_side = workers if part.parallel else 1
        ended = functools.partial(report.add, part)
        outcomes = processes.run(part.jobs, logs, limit, side_by_side, ended)
        for outcome in outcomes:  # those that were never begun
            if outcome.name not in report.parts[part.name]["jobs"]:
                report.add(part, outcome)
        if part.needed and any(outcome.code for outcome in outcomes):
            print(f"{part.name} failed: nothing else is run", flush=True)
            usable = False
        report.write()
    print("\nAll passed." if not report.wrong else "\n" + "\n".join(report.wrong))
    return int(bool(report.wrong))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=1800.0, help="seconds for all of it")
    parser.add_argument("--json", type=Path, help="what was found, written after each job")
    parser.add_argument("--logs", type=Path, default=Path("gpu-logs"), help="what jobs print")
    parser.add_argument("--only", default="", help="parts, with commas between them")
    parser.add_argument("--workers", type=int, default=3 * (os.cpu_count() or 1) // 2)
    parser.add_argument("--plan", type=Path, help="JSON: other sizes of the part shapes")
    options = parser.parse_args(arguments)
    from benchmarks.gpu.kernels import FAMILIES  # imports torch

    logs = options.logs.resolve()
    logs.mkdir(parents=True, exist_ok=True)
    listed = parts(FAMILIES, logs, options.plan)
    names = [part.name for part in listed]
    wanted = [name for name in options.only.split(",") if name] or names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(names)}")
    chosen = [part for part in listed if part.name in wanted]
    return run(chosen, options.budget, options.workers, logs, options.json)


if __name__ == "__main__":
    sys.exit(main())
