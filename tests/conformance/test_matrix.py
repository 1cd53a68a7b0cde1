"""The support matrix says what reports show, and for how long."""

from __future__ import annotations

import datetime
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import yaml

from vllm_di import cli
from vllm_di.conformance import matrix, matrix_html
from vllm_di.conformance.report import Case, CheckResult, Outcome, Report
from vllm_di.containers.evidence import report_files
from vllm_di.containers.manifest import LEVELS
from vllm_di.containers.ports import conf_of_project
from vllm_di.containers.tree import ConfigFiles
from vllm_di.errors import VllmDiError
from vllm_di.report_file import ReportError
from vllm_di.version import __version__
from vllm_di.vllm.conformance.report import Outcome as VllmCase
from vllm_di.vllm.conformance.report import Report as VllmReport

TODAY = datetime.date(2026, 11, 24)
PAGE = Path(__file__).parents[2] / "docs" / "support-matrix.md"


@pytest.fixture
def tree(tmp_path: Path) -> ConfigFiles:
    """One platform, ``chip``."""
    conf = tmp_path / "conf"
    (conf / "platform").mkdir(parents=True)
    (conf / "platform" / "chip.yaml").write_text(
        "# @package _global_\nplatform:\n  name: chip\n  level: declared\n"
        "  capabilities:\n    dtypes: [float32, float16]\n    sliding_window: true\n"
    )
    return ConfigFiles([conf])


def write(folder: Path, name: str = "chip", days: int = 0, **fields: Any) -> Path:
    """A report of a run ``days`` ago that passed float32 and failed float16."""
    outcomes: dict[str, Outcome] = {"float32": "pass", "float16": "fail"}
    cases = [
        Case(id=f"ops/test[{f}]", outcome=o, seconds=1.0, features=[f]) for f, o in outcomes.items()
    ]
    check = CheckResult(
        number=8, name="ops", title="Ops", required="contract", outcome="fail", cases=cases
    )
    report = Report(
        platform="chip",
        level="contract-tested",
        partial=False,
        form="short",
        simulated=True,
        started=datetime.datetime.combine(TODAY, datetime.time(), datetime.UTC)
        - datetime.timedelta(days=days),
        seconds=1.0,
        overrides=[],
        config_hash="0",
        interface_version="1.1",
        port_interface="1.1",
        seed=0,
        device="chip:0",
        versions={"vllm-di": "0.1.0", "torch": "2.13.0"},
        capabilities={},
        components={},
        waivers=[],
        checks=[check],
    )
    path = folder / f"{name}.json"
    msgspec.structs.replace(report, **fields).write(path)
    return path


def column(tree: ConfigFiles, *files: Path, version: str = "0.1.0") -> matrix.Column:
    (found,) = matrix.build(tree, files, version, TODAY).platforms
    return found


def test_without_a_report_all_is_declared(tree: ConfigFiles) -> None:
    found = column(tree)
    assert (found.level, found.evidence) == ("declared", [])
    assert {f: c.outcome for f, c in found.cells.items()} == dict.fromkeys(
        ["float32", "float16", "sliding window"], "declared"
    )


def test_a_report_gives_level_and_cells(tree: ConfigFiles, tmp_path: Path) -> None:
    file = write(tmp_path)
    found = column(tree, file)
    assert found.level == "contract-tested"
    assert found.cells["float32"] == matrix.Cell(
        outcome="pass", level="contract-tested", evidence=str(file)
    )
    texts = {feature: matrix.cell_text(cell) for feature, cell in found.cells.items()}
    assert texts == {"float32": "contract", "float16": "FAILS", "sliding window": "declared"}


def test_only_hardware_gets_a_tick(tree: ConfigFiles, tmp_path: Path) -> None:
    for level in LEVELS:
        found = column(tree, write(tmp_path, level=level))
        assert (matrix.cell_text(found.cells["float32"]) == "✓") == (level == "hardware-tested")


@pytest.mark.parametrize(
    ("level", "days", "version", "wanted"),
    [
        ("runtime-tested", 180, "0.1.0", "runtime-tested"),
        ("runtime-tested", 181, "0.1.0", "declared"),
        ("contract-tested", 400, "0.1.0", "declared"),
        ("hardware-tested", 181, "0.1.0", "runtime-tested"),
        ("hardware-tested", 361, "0.1.0", "declared"),
        ("runtime-tested", 1, "0.3.9", "runtime-tested"),
        ("runtime-tested", 1, "0.4.0", "declared"),
        ("runtime-tested", 1, "1.0.0", "declared"),
    ],
)
def test_a_report_that_is_old_loses_its_level(
    tree: ConfigFiles, tmp_path: Path, level: str, days: int, version: str, wanted: str
) -> None:
    found = column(tree, write(tmp_path, level=level, days=days), version=version)
    assert found.level == wanted
    expired = wanted != level
    assert found.evidence[0].expired == expired
    assert ("expired" in matrix.cell_text(found.cells["float32"])) == expired


def test_the_newest_run_of_a_device_counts(tree: ConfigFiles, tmp_path: Path) -> None:
    old = write(tmp_path, "old", days=9, level="runtime-tested")
    new = write(tmp_path, "new", days=1, level="contract-tested")
    other = write(tmp_path, "other", days=9, level="declared", device="chip:1")
    found = column(tree, old, new, other)
    assert [run.file for run in found.evidence] == [str(new), str(other)]
    assert found.level == "contract-tested"


@pytest.mark.parametrize(
    ("fields", "why"),
    [({"partial": True}, "a part of the suite"), ({"level": "none"}, "not even its first checks")],
    ids=str,
)
def test_a_report_without_a_level_is_refused(
    tree: ConfigFiles, tmp_path: Path, fields: dict[str, Any], why: str
) -> None:
    with pytest.raises(ReportError, match=rf"chip\.json: a report that shows no level.*{why}"):
        column(tree, write(tmp_path, **fields))


def test_a_recorded_report_bears_the_name_of_its_platform() -> None:
    files = report_files(ConfigFiles([conf_of_project()]))
    assert files
    for file in files:
        assert file.name == f"{Report.read(file).platform}.json"


def test_a_platform_that_is_not_installed_shows_its_report(
    tree: ConfigFiles, tmp_path: Path
) -> None:
    found = matrix.build(tree, [write(tmp_path, platform="other")], "0.1.0", TODAY)
    assert [(c.name, c.level) for c in found.platforms] == [
        ("chip", "declared"),
        ("other", "contract-tested"),
    ]


def test_a_broken_report_is_named(tree: ConfigFiles, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text("{")
    with pytest.raises(ReportError, match="broken"):
        column(tree, file)


def test_markdown_links_the_evidence(tree: ConfigFiles, tmp_path: Path) -> None:
    files = [write(tmp_path / "reports", days=200)]
    text = matrix.markdown(matrix.build(tree, files, "0.1.0", TODAY), tmp_path / "docs" / "page.md")
    assert "| float32 | [~~declared, expired~~](../reports/chip.json) |" in text
    assert "declared (expired: was contract-tested)" in text


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(tmp_path, platform="cpu", started=datetime.datetime.now(datetime.UTC))
    assert cli.run(["matrix", "--json", "--reports", str(tmp_path)]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=matrix.Matrix)
    cpu = next(c for c in found.platforms if c.name == "cpu")
    assert str(tmp_path / "chip.json") in [run.file for run in cpu.evidence]
    assert cli.run(["matrix"]) == 0
    assert "sliding window" in capsys.readouterr().out


def test_the_page_is_that_of_the_reports() -> None:
    tree = ConfigFiles([conf_of_project()])
    assert PAGE.read_text(encoding="utf-8") == matrix.page(tree, PAGE), "run make matrix"
    for file, text in matrix_html.pages(PAGE.parent):
        assert file.read_text(encoding="utf-8") == text, "run make matrix"


def test_html_shows_each_cell_with_its_evidence(
    tree: ConfigFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = matrix.build(tree, [write(tmp_path / "reports", days=200)], "0.1.0", TODAY)
    found.platforms[0].besides.append("the <graph> by eager")
    text = matrix_html.html(found, tmp_path / "docs" / "page.html")
    assert 'href="../reports/chip.json" class="mark declared expired">declared<' in text
    assert "the &lt;graph&gt; by eager" in text
    assert "was contract-tested" in text
    assert cli.run(["matrix", "--html"]) == 0
    assert "<th>hybrid_cpu_openvino</th>" in capsys.readouterr().out


def test_the_picture_has_a_dot_for_each_cell(tree: ConfigFiles, tmp_path: Path) -> None:
    found = matrix.build(tree, [write(tmp_path)], "0.1.0", TODAY)
    text = matrix_html.picture(found)
    assert xml.etree.ElementTree.fromstring(text).tag.endswith("svg")
    dots = re.findall(r"<title>chip, (.*): (\w+)</title>", text)
    words = {f: matrix.cell_text(c) for f, c in found.platforms[0].cells.items()}
    shown = {f: w.lower() for f, w in words.items() if w not in ("-", "not run", "waived")}
    assert dict(dots) == {f: "fail" if w == "fails" else w for f, w in shown.items()}


def test_every_platform_has_the_level_of_its_reports() -> None:
    """What a start announces is what was shown, neither more nor less."""
    tree = ConfigFiles([conf_of_project()])
    found = matrix.build(tree, report_files(tree), __version__, TODAY)
    for column in found.platforms:
        text = tree.options("platform")[column.name].read_text(encoding="utf-8")
        assert yaml.safe_load(text)["platform"]["level"] == column.level, column.name


def write_vllm(
    folder: Path,
    vllm: str,
    days: int = 0,
    outcome: Literal["pass", "fail"] = "pass",
    partial: bool = False,
) -> Path:
    """A report of a run inside vLLM ``days`` ago."""
    started = datetime.datetime.combine(TODAY, datetime.time(), datetime.UTC)
    report = VllmReport(
        vllm=f"{vllm}+cpu",
        platform="chip",
        started=started - datetime.timedelta(days=days),
        seconds=1.0,
        device="chip:0",
        partial=partial,
        versions={"vllm-di": "0.1.0", "torch": "2.13.0"},
        cases=[
            VllmCase(name="nothing-set", outcome="pass", seconds=1.0),
            VllmCase(name="compiled", outcome=outcome, seconds=1.0, compiled=True),
        ],
    )
    path = folder / f"{vllm}.json"
    report.write(path)
    return path


def test_a_platform_runs_in_the_versions_of_vllm_whose_cases_all_passed(
    tree: ConfigFiles, tmp_path: Path
) -> None:
    folder = tmp_path / "reports" / "vllm"
    files = [
        write_vllm(folder, "0.9.0"),
        write_vllm(folder, "0.10.0", outcome="fail"),
        write_vllm(folder, "0.28.0", days=181),
        write_vllm(folder, "0.31.0", days=180),
    ]
    found = matrix.build(tree, [], "0.1.0", TODAY, files)
    assert [run.vllm for run in found.vllm] == ["0.9.0", "0.10.0", "0.28.0", "0.31.0"]
    assert matrix.feature_rows(found)[-1] == ["runs in vLLM", "0.9.0, 0.31.0"]
    text = matrix.markdown(found, tmp_path / "docs" / "page.md")
    cell = "[0.9.0](../reports/vllm/0.9.0.json), [0.31.0](../reports/vllm/0.31.0.json)"
    assert f"| runs in vLLM | {cell} |" in text
    assert "| compiled | pass | FAILS | pass | pass |" in text
    assert "(expired)" in text
    page = matrix_html.html(found, tmp_path / "docs" / "page.html")
    assert '<a href="../reports/vllm/0.31.0.json">0.31.0</a>' in page
    assert "<td>FAILS</td>" in page


def test_a_part_of_the_suite_inside_vllm_is_no_evidence(tree: ConfigFiles, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="a part of the suite"):
        matrix.build(tree, [], "0.1.0", TODAY, [write_vllm(tmp_path, "0.31.0", partial=True)])


def test_a_broken_report_of_a_run_inside_vllm_is_named(tree: ConfigFiles, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text("{")
    with pytest.raises(VllmDiError, match="broken"):
        matrix.build(tree, [], "0.1.0", TODAY, [file])
