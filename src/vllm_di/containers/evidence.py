"""Recorded conformance reports, as far as a start needs them: which level a platform has shown.

The whole of a report is read by ``vllm_di.conformance``, which stands above.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from vllm_di.containers.manifest import LEVELS, Level
from vllm_di.containers.ports import Port, conf_of_project
from vllm_di.containers.tree import ConfigFiles
from vllm_di.errors import one_line


class Recorded(msgspec.Struct, frozen=True):
    """One report's outcome."""

    platform: str
    level: Level | Literal["none"]
    partial: bool


def report_files(tree: ConfigFiles) -> list[Path]:
    """The project's recorded reports, and those that ports ship in a folder beside their conf/."""
    folders = [conf_of_project().parent / "conformance" / "reports"]
    folders += [port.conf.parent / "reports" for port in tree.ports if port.conf]
    return [file for folder in folders for file in sorted(folder.glob("*.json"))]


def vllm_report_files() -> list[Path]:
    """The project's recorded reports of runs inside vLLM, one a version."""
    folder = conf_of_project().parent / "conformance" / "reports" / "vllm"
    return sorted(folder.glob("*.json"))


def port_of_report(tree: ConfigFiles, file: Path) -> Port | None:
    """The port that ships a report."""
    owners = (p for p in tree.ports if p.conf and file.parent == p.conf.parent / "reports")
    return next(owners, None)


def read_recorded(tree: ConfigFiles) -> tuple[list[Recorded], list[str]]:
    """-> (all recorded reports, a line for each that cannot be read)."""
    found, problems = [], []
    for file in report_files(tree):
        try:
            found.append(msgspec.json.decode(file.read_bytes(), type=Recorded))
        except (OSError, msgspec.DecodeError) as error:
            problems.append(f"{file}: this conformance report cannot be read: {one_line(error)}")
    return found, problems


def shown_level(reports: Iterable[Recorded], platform: str) -> Level:
    """The highest level that a platform's reports show; ``declared`` where there is none. Their
    age is not judged here: ``vllm-di matrix`` does."""
    shown: Level = LEVELS[0]
    for report in reports:
        if report.platform == platform and not report.partial and report.level != "none":
            shown = max(shown, report.level, key=LEVELS.index)
    return shown


def source_commit() -> str | None:
    """The commit of the source tree that runs, with ``+`` where it was changed; None outside a
    checkout. Stands in every report."""
    folder = str(Path(__file__).parent)
    words = ["git", "-C", folder, "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
