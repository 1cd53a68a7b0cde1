"""The support matrix: platforms × features, from recorded reports and never from claims.

    python -m vllm_di.conformance.matrix docs/support-matrix.md

writes the page of the docs. A report counts for ``VALID`` after its run and for two minors of
vllm-di; then its level falls. A platform without a report that counts is ``declared``.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from vllm_di.conformance import matrix_vllm
from vllm_di.conformance.compiling import COMPILED
from vllm_di.conformance.report import VALID, Outcome, Report, expires, has_expired
from vllm_di.containers.evidence import port_of_report, report_files, vllm_report_files
from vllm_di.containers.manifest import LEVELS, Capabilities, Level, Manifest, read_manifest
from vllm_di.containers.ports import conf_of_project
from vllm_di.containers.tree import ConfigFiles, shown
from vllm_di.errors import ConfigError
from vllm_di.report_file import ReportError
from vllm_di.version import __version__


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded run."""

    file: str
    """Path of the report."""
    level: Level
    """Reached when it ran."""
    counts_as: Level
    """Now."""
    ran: datetime.date
    expires: datetime.date
    expired: bool
    simulated: bool
    device: str
    form: Literal["short", "full"]
    overrides: list[str]
    versions: dict[str, str]
    failed: int
    """Number of cases."""
    features: dict[str, Outcome]


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One feature on one platform."""

    outcome: Outcome | Literal["declared"]
    """``declared``: the manifest claims it and no report that counts speaks of it."""
    level: Level = "declared"
    """That the evidence gives it."""
    expired: bool = False
    evidence: str | None = None


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """One platform."""

    name: str
    level: Level
    maintainer: str | None
    evidence: list[Evidence]
    """The newest run of each device and each set of overrides; the strongest first."""
    cells: dict[str, Cell]
    besides: list[str] = []
    """What ran besides the suite, a line each, by the manifest; it lifts no level."""


class Matrix(msgspec.Struct, frozen=True):
    """The whole table, as it stands on one day."""

    on: datetime.date
    features: list[str]
    platforms: list[Column]
    problems: list[str] = []
    """What is wrong with ports that are left out, a line each."""
    vllm: list[matrix_vllm.Run] = []
    """What ran inside vLLM."""


def build(
    tree: ConfigFiles,
    files: Iterable[Path],
    version: str,
    on: datetime.date,
    vllm: Iterable[Path] = (),
) -> Matrix:
    """The matrix of all platforms of ``tree``, from report ``files`` and those of runs inside
    ``vllm``, for vllm-di ``version``.

    Raises ReportError for a file that is no report or shows no level, ConfigError for a wrong
    manifest. A port out of tree is left out instead, with a line in ``problems``.
    """
    manifests, problems = {}, tree.warnings()
    for option, path in tree.options("platform").items():
        try:
            manifests[option] = _manifest(tree, option, path)
        except ConfigError as error:
            if tree.port_of(path) is None:
                raise
            problems.append(f"platform {option} is left out: {error}")
    runs: dict[str, list[Evidence]] = {name: [] for name in manifests}
    for file in sorted(files):
        try:
            report = _evidence_of(file)
        except ReportError as error:
            if port_of_report(tree, file) is None:
                raise
            problems.append(f"a report is left out: {error}")
            continue
        runs.setdefault(report.platform, []).append(_evidence(file, report, version, on))
    columns = [_column(name, manifests.get(name), found) for name, found in sorted(runs.items())]
    rows = {feature: None for column in columns for feature in column.cells}
    inside = matrix_vllm.build(vllm, version, on)
    return Matrix(on, sorted(rows, key=_place), columns, problems, inside)


def _evidence_of(file: Path) -> Report:
    """A report that shows a level. Raises ReportError for another."""
    report = Report.read(file)
    if report.partial or report.level == "none":
        why = "a part of the suite was run" if report.partial else "not even its first checks hold"
        raise ReportError(f"{file}: a report that shows no level is no evidence: {why}")
    return report


def declared(capabilities: Capabilities) -> list[str]:
    """The features that a manifest claims, under the names that reports use."""
    found: list[str] = list(capabilities.dtypes)
    found += [f"KV cache in {dtype}" for dtype in capabilities.kv_dtypes]
    flags = {
        "sliding window": capabilities.sliding_window,
        "soft cap": capabilities.soft_cap,
        "graphs": capabilities.graphs,
        "batch invariance": capabilities.batch_invariant,
    }
    found += [name for name, claimed in flags.items() if claimed]
    found += [f"tensor parallel {size}" for size in capabilities.tensor_parallel if size > 1]
    return found + [f"quantization {option}" for option in capabilities.quantization]


def _manifest(tree: ConfigFiles, option: str, path: Path) -> Manifest:
    lines = tree.read(path).lines
    node = tree.values(path).get("platform")
    foreign = tree.port_of(path) is not None

    def place(key: str) -> str:
        return f"{shown(path)}:{lines.get(key, 1)}"

    return read_manifest(node, option, place, out_of_tree=foreign)


def _evidence(file: Path, report: Report, version: str, on: datetime.date) -> Evidence:
    ran = report.started.date()
    assert report.level != "none"  # refused before
    late = has_expired(ran, report.versions.get("vllm-di", version), version, on)
    fallen: Level = (
        "runtime-tested" if report.level == LEVELS[-1] and on <= ran + 2 * VALID else "declared"
    )
    return Evidence(
        file=str(file),
        level=report.level,
        counts_as=fallen if late else report.level,
        ran=ran,
        expires=expires(ran),
        expired=late,
        simulated=report.simulated,
        device=report.device,
        form=report.form,
        overrides=report.overrides,
        versions=report.versions,
        failed=len(report.failed),
        features=report.features(),
    )


def _rank(evidence: Evidence) -> tuple[int, datetime.date]:
    return LEVELS.index(evidence.counts_as), evidence.ran


def _column(name: str, manifest: Manifest | None, runs: Sequence[Evidence]) -> Column:
    newest: dict[tuple[str, bool, str], Evidence] = {}
    for run in sorted(runs, key=lambda r: r.ran):
        newest[run.device, run.simulated, " ".join(run.overrides)] = run
    evidence = sorted(newest.values(), key=_rank, reverse=True)
    cells: dict[str, Cell] = {}
    for run in evidence:  # the strongest speaks first
        for feature, outcome in run.features.items():
            cell = Cell(
                outcome=outcome,
                level=_level_of(feature, run),
                expired=run.expired,
                evidence=run.file,
            )
            if feature not in cells or cells[feature].outcome in ("not-run", "not-declared"):
                cells[feature] = cell
    if manifest is not None:
        for feature in declared(manifest.capabilities):
            cells.setdefault(feature, Cell(outcome="declared"))
    return Column(
        name=name,
        level=evidence[0].counts_as if evidence else "declared",
        maintainer=manifest.maintainer if manifest else None,
        evidence=evidence,
        cells=cells,
        besides=list(manifest.besides) if manifest else [],
    )


def _level_of(feature: str, run: Evidence) -> Level:
    """The level that a run gives a feature: that kernels compile proves only that they compile."""
    if run.counts_as == "compile-checked" and not feature.startswith(COMPILED):
        return "contract-tested"
    return run.counts_as


ORDER = ("float32", "bfloat16", "float16", "KV cache", "sliding window", "soft cap", "graphs")


def _place(feature: str) -> tuple[int, str]:
    """Dtypes first, then as in ORDER, then by name."""
    found = next((i for i, start in enumerate(ORDER) if feature.startswith(start)), len(ORDER))
    return found, feature


# -- as text -----------------------------------------------------------------------------------

HEAD = ("platform", "level", "on", "ran", "valid until", "form", "versions", "failed", "report")
NOTHING = "-"
SHOWN = ("vllm-di", "torch", "commit")
"""Versions that the table names; the report has all."""


def cell_text(cell: Cell | None) -> str:
    """A tick only for what ran on hardware; else the level in one word."""
    if cell is None or cell.outcome == "not-declared":
        return NOTHING
    if cell.outcome in ("fail", "not-run", "waived", "declared"):
        return {"fail": "FAILS", "not-run": "not run"}.get(cell.outcome, cell.outcome)
    word = "✓" if cell.level == LEVELS[-1] else cell.level.partition("-")[0]
    return f"({word}, expired)" if cell.expired else word


def evidence_rows(matrix: Matrix) -> list[list[str]]:
    """One for each run, and one for a platform without any."""
    rows = []
    for column in matrix.platforms:
        for run in column.evidence:
            device = f"{run.device} (simulated)" if run.simulated else run.device
            level = f"{run.counts_as} (expired: was {run.level})" if run.expired else run.level
            versions = ", ".join(f"{n} {run.versions[n]}" for n in SHOWN if n in run.versions)
            until = run.expires.isoformat()
            row = [column.name, level, device, run.ran.isoformat(), until, run.form, versions]
            rows.append([*row, str(run.failed), Path(run.file).name])
        if not column.evidence:
            rows.append([column.name, "declared", *[NOTHING] * 6, "none"])
    return rows


def feature_rows(matrix: Matrix) -> list[list[str]]:
    """One for each feature, and one for the versions of vLLM that a platform's parts run in."""
    rows = [
        [feature, *(cell_text(column.cells.get(feature)) for column in matrix.platforms)]
        for feature in matrix.features
    ]
    return [*rows, [matrix_vllm.FEATURE, *(_vllm_cell(matrix, c.name) for c in matrix.platforms)]]


def _vllm_cell(matrix: Matrix, platform: str) -> str:
    return ", ".join(r.vllm for r in matrix_vllm.runs_in(matrix.vllm, platform)) or NOTHING


def markdown(matrix: Matrix, page: Path) -> str:
    """The tables with links to the evidence, for a page at ``page``."""
    names = [column.name for column in matrix.platforms]
    files = {Path(run.file).name: run.file for c in matrix.platforms for run in c.evidence}
    besides = {column.name: "; ".join(column.besides) or NOTHING for column in matrix.platforms}
    levels = [
        [*row[:-1], _link(row[-1], files, page), besides[row[0]]] for row in evidence_rows(matrix)
    ]
    features = [
        [feature, *(_linked_cell(c.cells.get(feature), page) for c in matrix.platforms)]
        for feature in matrix.features
    ]
    features.append([matrix_vllm.FEATURE, *(_linked_vllm(matrix, name, page) for name in names)])
    lines = [*_table([*HEAD, "ran besides"], levels), "", *_table(["feature", *names], features)]
    return "\n".join([*lines, *_inside_vllm(matrix, page), ""])


def _linked_vllm(matrix: Matrix, platform: str, page: Path) -> str:
    runs = matrix_vllm.runs_in(matrix.vllm, platform)
    links = [f"[{run.vllm}]({os.path.relpath(run.file, page.parent)})" for run in runs]
    return ", ".join(links) or NOTHING


def _inside_vllm(matrix: Matrix, page: Path) -> list[str]:
    if not matrix.vllm:
        return []
    files = {Path(run.file).name: run.file for run in matrix.vllm}
    rows = matrix_vllm.run_rows(matrix.vllm, SHOWN)
    linked = [[*row[:-1], _link(row[-1], files, page)] for row in rows]
    heads = ["case", *(f"vLLM {run.vllm}" for run in matrix.vllm)]
    return [
        *("", "## Inside vLLM", "", INSIDE_VLLM, ""),
        *_table(matrix_vllm.HEAD, linked),
        "",
        *_table(heads, matrix_vllm.case_rows(matrix.vllm)),
    ]


def _link(name: str, files: Mapping[str, str], page: Path) -> str:
    return f"[{name}]({os.path.relpath(files[name], page.parent)})" if name in files else name


def _linked_cell(cell: Cell | None, page: Path) -> str:
    text = cell_text(cell)
    if cell is None or cell.evidence is None or text == NOTHING:
        return text
    text = f"~~{text.strip('()')}~~" if cell.expired else text
    return f"[{text}]({os.path.relpath(cell.evidence, page.parent)})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


# -- the page ----------------------------------------------------------------------------------

INTRODUCTION = """\
# Support matrix

Generated by `make matrix` from the reports in `conformance/reports`: each row and cell links to
its evidence. The page shows the day of the newest report; `vllm-di matrix` shows today, where a
report older than 180 days or two minors has lost its level.

A cell says how far the feature was shown to work: `contract` on a simulated device, `compile` by
the real target's compiler alone, `runtime` on the platform's real software, a tick on the hardware
alone. `declared` is a claim of the manifest that no report bears out. What ran besides the suite
stands in a column of its own and lifts no level.

The same as a [page](support-matrix.html) and as a picture:

![platforms, levels and features](support-matrix.svg)
"""


INSIDE_VLLM = """\
The parts of a platform in the slots of the real [vLLM](vllm.md), each case beside stock vLLM. A
version stands in the row above when every case of its newest report passed."""


def of_project(tree: ConfigFiles) -> Matrix:
    """The project's own platforms, as of the day of the newest report."""
    files, inside = report_files(tree), vllm_report_files()
    days = [Report.read(file).started.date() for file in files]
    days += [run.ran for run in matrix_vllm.build(inside, __version__, datetime.date.min)]
    return build(tree, files, __version__, max(days, default=datetime.date.min), inside)


def page(tree: ConfigFiles, path: Path) -> str:
    """The page as it should stand at ``path``, of the project's own platforms."""
    return f"{INTRODUCTION}\n{markdown(of_project(tree), path)}"


def main(path: Path) -> None:
    path.write_text(page(ConfigFiles([conf_of_project()]), path), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
