"""What the engine is to reach beside its peers, and how far a machine's figures are from it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from benchmarks.peers.works import ENGINES, TITLES, WEIGHTS, Figure

OURS = ENGINES[0]
HEAD = ["work", "weights", "wanted", "found", ""]

Figures = dict[tuple[str, str, str], Figure]
"""By row, weights and engine."""


class Found(msgspec.Struct, frozen=True):
    """A figure to judge."""

    value: float
    told: str
    """With its unit, and with the peer that it is against."""


class Goal(msgspec.Struct, frozen=True):
    row: str
    weights: str
    wanted: str
    bound: float
    find: Callable[[Figures, str, str], Found | None]
    """Of a row and its weights; None where something that it takes was not measured."""
    least: bool = True
    """The bound is the least that is wanted; False: the most."""

    def line(self, figures: Figures) -> list[str]:
        found = self.find(figures, self.row, self.weights)
        head = [TITLES[self.row], self.weights, self.wanted]
        if found is None:
            return [*head, "not measured", ""]
        met = found.value >= self.bound if self.least else found.value <= self.bound
        return [*head, found.told, "met" if met else "missed"]


def over(*peers: str) -> Callable[[Figures, str, str], Found | None]:
    """How many times as good as the best of these peers, of all without names."""

    def find(figures: Figures, row: str, weights: str) -> Found | None:
        ours = _measured(figures, row, weights)
        theirs = [
            f
            for p in peers or ENGINES[1:]
            if (f := _measured(figures, row, weights, p)) is not None
        ]
        if ours is None or not theirs:
            return None
        times, name = min((ours.times_better(f), f.engine) for f in theirs)
        return Found(times, f"{times:.2f} x {name}")

    return find


def of_limit(figures: Figures, row: str, weights: str) -> Found | None:
    """The share of what the machine allowed."""
    ours = _measured(figures, row, weights)
    if ours is None or not ours.limit:
        return None
    share = ours.median / ours.limit
    return Found(share, f"{share:.0%} of the limit")


def itself(figures: Figures, row: str, weights: str) -> Found | None:
    """The figure as it is."""
    ours = _measured(figures, row, weights)
    return Found(ours.median, f"{ours.median:,.1f} {ours.unit}") if ours is not None else None


def of_row(other: str) -> Callable[[Figures, str, str], Found | None]:
    """The time over that of another row of ours."""

    def find(figures: Figures, row: str, weights: str) -> Found | None:
        ours, base = _measured(figures, row, weights), _measured(figures, other, weights)
        if ours is None or base is None:
            return None
        times = base.times_better(ours)
        return Found(times, f"{times:.2f} x the time")

    return find


def _measured(figures: Figures, row: str, weights: str, engine: str = OURS) -> Figure | None:
    figure = figures.get((row, weights, engine))
    return figure if figure is not None and figure.values else None


def _best(row: str, weights: str, times: float, *peers: str) -> Goal:
    whom = " and ".join(peers) or "the best peer"
    return Goal(row, weights, f"{times:.2f} x {whom}", times, over(*peers))


PREFILLS = ("prefill-8x512", "prefill-1x1024")
GOALS = [
    *(_best(row, "bf16", 1.05) for row in (*PREFILLS, "prefill-1x1024-1b")),
    *(_best(row, "int8", 1.2, "OpenVINO") for row in PREFILLS),
    *(_best(row, "4-bit", 1.1, "OpenVINO") for row in PREFILLS),
    *(
        goal
        for row in ("decode-1", "decode-1-1b")
        for goal in (
            _best(row, "bf16", 1.0),
            Goal(row, "bf16", "90% of the limit", 0.9, of_limit),
        )
    ),
    *(_best(row, "bf16", 1.3) for row in ("decode-8", "decode-32")),
    *(_best(row, "int8", 1.7) for row in ("decode-1", "decode-8", "decode-32")),
    Goal("decode-1-8k", "bf16", "1.8 x the time after 128 tokens", 1.8, of_row("decode-1"), False),
    _best("server", "bf16", 1.4, "vLLM"),
    _best("server-ttft-p50", "bf16", 1 / 0.6, "vLLM"),
    _best("server-ttft-p99", "bf16", 1.0, "vLLM"),
    Goal("server-itl-p99", "bf16", "twice the p50", 2.0, of_row("server-itl-p50"), False),
    Goal("start", "bf16", "3 s", 3.0, itself, False),
    Goal("memory", "bf16", "700 MB", 700, itself, False),
    Goal("memory", "4-bit", "450 MB", 450, itself, False),
]


def lines(figures: list[Figure]) -> list[list[str]]:
    """One for each goal, in the order of the report."""
    known = {figure.key: figure for figure in figures}
    order = list(TITLES)
    goals = sorted(GOALS, key=lambda g: (order.index(g.row), WEIGHTS.index(g.weights)))
    return [goal.line(known) for goal in goals]
