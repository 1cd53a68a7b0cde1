"""``python -m benchmarks.peers.report``: the tables of the README and of ``docs/benchmarks.md``,
and the chart, from ``results.json``. Nobody types a figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.peers import goals
from benchmarks.peers.chart import draw
from benchmarks.peers.environments import ROOT
from benchmarks.peers.roofline import Roofline
from benchmarks.peers.works import ENGINES, MAKES, TITLES, Figure, Machine, Results
from vllm_di.commands.table import print_table

OURS = ENGINES[0]
CHART = "AMD"
"""The make that the chart shows."""
HEAD = ["work", "weights", "engine", "median", "lowest to highest", "ours is", "of the limit"]
OLD = " †"
"""Marks decode rows of the old method."""
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"


def read(file: Path) -> Results:
    """Empty before the first run."""
    return msgspec.json.decode(file.read_bytes(), type=Results) if file.is_file() else Results()


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def row(figure: Figure, ours: Figure | None) -> list[str]:
    old = figure.row.startswith("decode") and not figure.by_steps
    head = [TITLES[figure.row] + OLD * old, figure.weights, figure.engine]
    if figure.failed or not figure.values:
        return [*head, f"not run: {figure.failed or 'no values'}"[:80], "", "", ""]
    once = len(figure.values) == 1
    low, high = number(min(figure.values)), number(max(figure.values))
    ratio = f"{ours.times_better(figure):.2f} x" if ours and ours.values else ""
    return [
        *head,
        f"{number(figure.median)} {figure.unit}",
        "one run" if once else f"{low} to {high}",
        "" if figure.engine == OURS else ratio,
        f"{figure.median / figure.limit:.0%}" if figure.limit else "",
    ]


def rows(figures: list[Figure]) -> list[list[str]]:
    found = []
    for figure in figures:
        same = (f for f in figures if f.key == (figure.row, figure.weights, OURS))
        found.append(row(figure, next(same, None)))
    return found


def show(figures: list[Figure]) -> None:
    print_table(HEAD, rows(figures))


def show_goals(machine: Machine) -> None:
    print_table(goals.HEAD, goals.lines(machine.figures))


def markdown(head: list[str], lines: list[list[str]]) -> str:
    table = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def limits(rooflines: dict[str, Roofline]) -> str:
    def span(values: list[float]) -> str:
        low, high = min(values) / 1e9, max(values) / 1e9
        return number(low) if number(low) == number(high) else f"{number(low)} to {number(high)}"

    found = list(rooflines.values())
    return (
        f"Limits of the machine in these runs: {span([r.read for r in found])} GB/s read, "
        f"{span([r.bf16 for r in found])} GFLOP/s in bf16 products, "
        f"{span([r.int8 for r in found])} GOP/s in int8 products."
    )


def short(figures: list[Figure]) -> str:
    """Rows beside engines, the best of each row in bold."""
    lines = []
    for name, weights in dict.fromkeys((f.row, f.weights) for f in figures):
        of_row = {f.engine: f for f in figures if (f.row, f.weights) == (name, weights)}
        measured = [f for f in of_row.values() if f.values]
        if len(of_row) < 2 or not measured:
            continue
        best = next(f for f in measured if all(f.times_better(g) >= 1 for g in measured))
        cells = []
        for engine in ENGINES:
            figure = of_row.get(engine)
            text = number(figure.median) if figure is not None and figure.values else ""
            cells.append(f"**{text}**" if figure is best else text)
        old = name.startswith("decode") and not all(f.by_steps for f in measured)
        lines.append([f"{TITLES[name]}{OLD * old}, {weights}, {measured[0].unit}", *cells])
    return markdown(["", *ENGINES], lines)


def put(file: Path, text: str) -> None:
    """Between the two marks. Raises ValueError where they are not."""
    page = file.read_text()
    if BEGIN not in page or END not in page:
        raise ValueError(f"{file}: no {BEGIN} and {END}")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def each(results: Results, level: str, table: Callable[[Machine], str]) -> str:
    """A heading and a table for each make; one that was never measured is said to be so."""
    parts = []
    for make in MAKES.values():
        machine = results.machines.get(make)
        if machine is None:
            parts.append(f"{level} {make}\n\nNever measured.")
            continue
        notes = "".join(f" {note}" for note in machine.notes)
        head = f"{level} {make}\n\n{machine.cpu}; {machine.date}.{notes}"
        parts.append(f"{head}\n\n{table(machine)}")
    return "\n\n".join(parts)


def full(machine: Machine) -> str:
    table = markdown(HEAD, rows(machine.figures))
    wanted = markdown(goals.HEAD, goals.lines(machine.figures))
    parts = [table, "What is wanted, and what these figures say:", wanted]
    return "\n\n".join([limits(machine.rooflines), *parts] if machine.rooflines else parts)


def write(results: Results) -> None:
    put(ROOT / "docs/benchmarks.md", each(results, "###", full))
    put(ROOT / "README.md", each(results, "###", lambda machine: short(machine.figures)))
    if drawn := results.machines.get(CHART):
        draw(drawn.figures, ROOT / "docs/peers.png", f"{drawn.cpu}, {drawn.date}")


if __name__ == "__main__":
    write(read(Path(__file__).parent / "results.json"))
