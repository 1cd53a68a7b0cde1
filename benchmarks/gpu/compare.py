"""How far two tensors are apart, in figures: nothing is raised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_di.conformance.numbers import LONG, TOLERANCES


@dataclass(frozen=True)
class Found:
    """Of all outputs of one case, the worst."""

    error: float
    """Largest absolute difference where both are finite."""
    ratio: float
    """Largest difference as a share of what it may be; it passes up to 1."""
    relative: float
    absolute: float
    """The tolerance: relative * size + absolute."""
    wrong: int
    """Elements beyond it, those of which only one is finite included."""
    count: int
    note: str = ""

    @property
    def passed(self) -> bool:
        return not self.wrong and not self.note

    def row(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "error": _short(self.error),
            "ratio": _short(self.ratio),
            "tolerance": [self.relative, self.absolute],
            "wrong": self.wrong,
            "of": self.count,
            **({"note": self.note} if self.note else {}),
        }


def tolerance(dtype: torch.dtype, *, long: bool) -> tuple[float, float]:
    """(relative, absolute) of the conformance suite; exact for integers."""
    if not dtype.is_floating_point:
        return 0.0, 0.0
    relative, absolute = TOLERANCES[dtype]
    return relative, LONG[dtype] if long else absolute


def compare(got: Tensor, want: Tensor, relative: float, absolute: float) -> Found:
    """``want`` in fp32 or fp64, on either's device. NaN equals NaN, an infinity itself."""
    if got.shape != want.shape:
        note = f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
        return Found(float("inf"), float("inf"), relative, absolute, 0, got.numel(), note)
    if not got.numel():
        return Found(0.0, 0.0, relative, absolute, 0, 0)
    a, b = got.detach().to(want.device).double(), want.detach().double()
    finite = a.isfinite() & b.isfinite()
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(finite, (a - b).abs(), torch.where(same, 0.0, torch.inf))
    may = relative * torch.where(b.isfinite(), b.abs(), 0.0) + absolute
    ratio = torch.where(off == 0, 0.0, off / may)
    wrong = int((ratio > 1).sum())
    apart = off[finite]
    note = ""
    if wrong:
        place = int(ratio.flatten().nan_to_num(torch.inf).argmax())
        at = [int(i) for i in torch.unravel_index(torch.tensor(place), got.shape)]
        note = (
            f"worst at {at}: {a.flatten()[place].item():.6g}, not {b.flatten()[place].item():.6g}"
        )
    return Found(
        error=float(apart.max()) if apart.numel() else 0.0,
        ratio=float(ratio.max()),
        relative=relative,
        absolute=absolute,
        wrong=wrong,
        count=got.numel(),
        note=note,
    )


def worst(found: list[Found]) -> Found:
    return max(found, key=lambda one: (not one.passed, one.ratio))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
