"""An assembly as a picture (SVG): containers as boxes, with their slots."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import jinja2

from vllm_di.commands.arguments import UsageError
from vllm_di.commands.table import short_name
from vllm_di.server.overview import ContainerView, Overview, SlotView

TEMPLATES = Path(__file__).parents[1] / "templates" / "graph"
COLOURS = {
    "default": "#66707b",
    "platform": "#1f66c8",
    "model": "#7a3fc0",
    "checkpoint": "#0c7a7a",
    "auto": "#9a5b00",
    "command line": "#1a7f46",
}
OTHER = "#b0306a"
"""Of whatever else chose: the option of another group, or a caller's overrides."""
TITLES = {
    "ServerContainer": ("API process", "text, HTTP; no torch"),
    "EngineContainer": ("Engine process", "token ids, blocks"),
    "WorkerContainer": ("Worker", "tensors; one per rank"),
}
WORKERS_IN_A_ROW = 3
# in pixels
BOX, HEAD, ROW, GAP, TOP, MARGIN, LEGEND = 350, 66, 54, 46, 104, 24, 46
CLASS_LETTERS, PLACE_LETTERS, HEAD_LETTERS = 50, 56, 110
"""What fits into a box, in letters of the two small types, and beside each other above two."""
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass
class Box:
    """A container at its place."""

    view: ContainerView
    x: int
    y: int
    title: str
    what: str

    @property
    def height(self) -> int:
        return HEAD + ROW * len(self.view.slots)

    @property
    def bottom(self) -> int:
        return self.y + self.height


def picture(overview: Overview) -> str:
    """The server's container above the engine's; beside them the workers', a box for each stage of
    each role."""
    boxes = _boxes(overview)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"fit": _fit, "short": short_name, "legal": _legal}
    choosers = {s.chosen_by: _colour(s) for box in boxes for s in box.view.slots}
    names = {
        "overview": overview,
        "boxes": boxes,
        "arrows": _arrows(boxes),
        "choosers": choosers,
        "width": max(box.x for box in boxes) + BOX + MARGIN,
        "height": max(box.bottom for box in boxes) + LEGEND,
        "size": {"box": BOX, "head": HEAD, "row": ROW, "margin": MARGIN},
        "letters": {"class": CLASS_LETTERS, "place": PLACE_LETTERS, "head": HEAD_LETTERS},
    }
    return environment.get_template("assembly.svg.jinja").render(names) + "\n"


def write(name: str, text: str) -> None:
    """Raises UsageError where the file cannot be written."""
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"--graph {name}: the picture cannot be written: {error.strerror}"
        ) from None


def _boxes(overview: Overview) -> list[Box]:
    boxes: list[Box] = []
    top, num_workers = TOP, 0
    left, right = MARGIN, MARGIN + BOX + GAP
    for view in overview.containers:
        title, what = TITLES[view.name]
        if overview.replicas > 1 and view.name != "ServerContainer":
            what += f"; {overview.replicas} replicas"
        title = f"{title} · {view.part}" if view.part else title
        if view.name == "WorkerContainer":
            row, column = divmod(num_workers, WORKERS_IN_A_ROW)
            y = TOP + row * (HEAD + ROW * len(view.slots) + GAP)
            boxes.append(Box(view, right + column * (BOX + GAP), y, title, what))
            num_workers += 1
        else:
            boxes.append(Box(view, left, top, title, what))
            top = boxes[-1].bottom + GAP
    return boxes


def _arrows(boxes: list[Box]) -> list[tuple[int, int, int, int]]:
    """(x, y, x, y): from the server to the engine, from there to the workers, and from each worker
    to the next beside it."""
    server, engine, *workers = boxes
    arrows = [(server.x + BOX // 2, server.bottom, engine.x + BOX // 2, engine.y)]
    middle = engine.y + HEAD // 2
    arrows.append((engine.x + BOX, middle, workers[0].x, middle))
    for one, following in pairwise(workers):
        if one.y == following.y:
            y = one.y + HEAD // 2
            arrows.append((one.x + BOX, y, following.x, y))
    return arrows


def _colour(slot: SlotView) -> str:
    return COLOURS.get(slot.chosen_by, OTHER)


def _fit(text: str, letters: int) -> str:
    """As much as fits: a class's and a place's ends say the most."""
    return text if len(text) <= letters else f"…{text[1 - letters :]}"


def _legal(text: str) -> str:
    """Without characters that XML does not allow."""
    return _NOT_XML.sub("\ufffd", text)
