"""The support matrix as a page of HTML and as a picture (SVG), from the templates beside them.

    python -m vllm_di.conformance.matrix_html docs

writes ``support-matrix.html`` and ``support-matrix.svg`` there, of the project's own platforms.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jinja2
from markupsafe import Markup

from vllm_di.conformance import matrix as data
from vllm_di.conformance import matrix_vllm
from vllm_di.conformance.compiling import COMPILED
from vllm_di.conformance.matrix import Cell, Column, Matrix
from vllm_di.containers.manifest import LEVELS
from vllm_di.containers.ports import conf_of_project
from vllm_di.containers.tree import ConfigFiles

TEMPLATES = Path(__file__).parents[1] / "templates" / "matrix"
MEANINGS = {
    "hardware": "on the hardware itself",
    "runtime": "on the platform's real software",
    "compile": "by the real target's compiler alone",
    "contract": "on a simulated device",
    "declared": "a claim that no report bears out",
    "fail": "it was tried, and does not hold",
}
"""First word of a level, or what took its place."""


def html(matrix: Matrix, page: Path) -> str:
    """The page as it should stand at ``page``: links to reports are relative to it."""

    def link(file: str) -> str:
        return Path(os.path.relpath(file, page.parent)).as_posix()

    def mark(level: str, expired: bool = False, file: str | None = None) -> Markup:
        word = level.partition("-")[0]
        tag, href = ("a", Markup(' href="{}"').format(link(file))) if file else ("span", "")
        old = " expired" if expired else ""
        form = Markup('<{0}{1} class="mark {2}{3}">{4}</{0}>')
        return form.format(tag, href, word, old, level)

    def cell(found: Cell | None) -> Markup:
        text = data.cell_text(found)
        if found is None or text == data.NOTHING or found.outcome in ("not-run", "waived"):
            return Markup('<span class="none">{}</span>').format(text)
        return mark(_word(found) or text, found.expired, found.evidence)

    names: dict[str, object] = {"matrix": matrix, "legend": list(MEANINGS.items())}
    names["vllm_cases"] = matrix_vllm.case_rows(matrix.vllm)
    return _render("page.html.jinja", names | {"link": link, "mark": mark, "cell": cell})


def picture(matrix: Matrix) -> str:
    """Platforms down, features across, a dot for each cell. What compiles for single targets is one
    feature here."""
    features = [name for name in matrix.features if not name.startswith(COMPILED)]
    if len(features) < len(matrix.features):
        features.append("compiles ahead")
    rows = [
        (column.name, column.level, [_dot(column, name) for name in features])
        for column in matrix.platforms
    ]
    legend = list(MEANINGS.items())
    return _render("picture.svg.jinja", {"features": features, "rows": rows, "legend": legend})


def _dot(column: Column, feature: str) -> str | None:
    if feature != "compiles ahead":
        return _word(column.cells.get(feature))
    words = {_word(cell) for name, cell in column.cells.items() if name.startswith(COMPILED)}
    return next((word for word in ("fail", "compile", "declared") if word in words), None)


def _word(cell: Cell | None) -> str | None:
    """The class of a cell; None where there is nothing to show."""
    if cell is None or cell.outcome in ("not-declared", "not-run", "waived"):
        return None
    if cell.outcome in ("fail", "declared"):
        return cell.outcome
    return cell.level.partition("-")[0]


def _render(name: str, names: dict[str, object]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(name).render(names) + "\n"


def pages(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, its text) of the project's own platforms, as they should stand in ``folder``."""
    matrix = data.of_project(ConfigFiles([conf_of_project()]))
    page = folder / "support-matrix.html"
    yield page, html(matrix, page)
    yield folder / "support-matrix.svg", picture(matrix)


def main(folder: Path) -> None:
    for file, text in pages(folder):
        file.write_text(text, encoding="utf-8")


assert {level.partition("-")[0] for level in LEVELS} < set(MEANINGS)

if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
