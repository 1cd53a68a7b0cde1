"""The time of one kind of step, fitted to measured ones: linear between measured numbers of rows,
and linear in what else counts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SPACING = 1.25
"""Of two neighbouring knots the larger is at least so many times the smaller: timings are noisy,
and a knot wants steps of its own."""
USUAL = 0.25
"""Share of its time by which a step may be off and count in full, so that the fit is that of the
mean. What is beyond counts less: something disturbed that step."""
ROUNDS = 20
"""Of reweighting."""


class Curve:
    """Seconds of a step of so many rows, plus a slope for each other quantity."""

    def __init__(
        self, rows: Sequence[int], others: Sequence[Sequence[float]], seconds: Sequence[float]
    ) -> None:
        """Fit measured steps: rows of each, its other quantities, and its seconds. At least one."""
        self.knots = _knots(rows)
        hats = np.array([_hat(self.knots, row) for row in rows], np.float64)
        more = np.array(others, np.float64).reshape(len(rows), -1)
        target = np.array(seconds, np.float64)
        kept = [i for i in range(more.shape[1]) if more[:, i].any()]
        while True:
            found = _fit(np.hstack([hats, more[:, kept]]), target)
            slopes = found[len(self.knots) :]
            if not len(slopes) or slopes.min() >= 0:
                break
            del kept[int(slopes.argmin())]  # more work takes no less time: that was noise
        self.values = [max(0.0, float(v)) for v in found[: len(self.knots)]]
        self.slopes = [0.0] * more.shape[1]
        for index, slope in zip(kept, slopes, strict=True):
            self.slopes[index] = float(slope)

    def seconds(self, rows: int, others: Sequence[float]) -> float:
        """Beyond the knots the line through the last two goes on."""
        knots, values = self.knots, self.values
        if len(knots) == 1:
            total = values[0] * max(1.0, rows / knots[0])
        else:
            right = min(max(bisect_right(knots, rows), 1), len(knots) - 1)
            left = right - 1
            part = (rows - knots[left]) / (knots[right] - knots[left])
            total = values[left] + part * (values[right] - values[left])
        for slope, other in zip(self.slopes, others, strict=True):
            total += slope * other
        return max(total, min(values))


def _knots(rows: Sequence[int]) -> list[int]:
    """Of the measured numbers, the first, the last, and some between."""
    known = sorted(set(rows))
    knots = [known[0]]
    for row in known[1:-1]:
        if row >= SPACING * knots[-1] and known[-1] >= SPACING * row:
            knots.append(row)
    return knots if known[-1] == knots[-1] else [*knots, known[-1]]


def _hat(knots: Sequence[int], row: int) -> list[float]:
    """Weights of the knots' values at a number of rows within them."""
    weights = [0.0] * len(knots)
    right = bisect_right(knots, row)
    if right == len(knots):
        weights[-1] = 1.0
        return weights
    part = (row - knots[right - 1]) / (knots[right] - knots[right - 1])
    weights[right - 1], weights[right] = 1.0 - part, part
    return weights


def _fit(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The coefficients with the least relative errors, by Huber's measure."""
    scaled = matrix / target[:, None]
    size = np.abs(scaled).max(axis=0)
    size[size == 0.0] = 1.0
    scaled = scaled / size
    weights = np.ones(len(target), np.float64)
    found = np.zeros(matrix.shape[1], np.float64)
    for _ in range(ROUNDS):
        found = np.linalg.lstsq(scaled * weights[:, None], weights, rcond=1e-9)[0]
        off = np.abs(scaled @ found - 1.0)
        weights = np.sqrt(USUAL / np.maximum(off, USUAL))
    return np.asarray(found / size, np.float64)
