"""The bar chart of the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "vllm-di": "#1f6feb",
    "llama.cpp": "#8b949e",
    "OpenVINO": "#b08800",
    "vLLM": "#2da44e",
    "transformers": "#bc4c00",
}


def draw(results: list[Any], file: Path) -> None:
    """One panel for each work, a bar for each engine and kind of weights."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    works = list(dict.fromkeys(r.work for r in results))
    figure, panels = plt.subplots(1, len(works), figsize=(3.2 * len(works), 4), squeeze=False)
    for panel, work in zip(panels[0], works, strict=True):
        bars = [r for r in results if r.work == work and r.rates]
        places = range(len(bars))
        panel.barh(places, [r.rate for r in bars], color=[COLOURS[r.engine] for r in bars])
        panel.set_yticks(places, [f"{r.engine} {r.weights}" for r in bars], fontsize=7)
        panel.invert_yaxis()
        panel.set_title(f"{work}, tokens/s", fontsize=9)
        panel.tick_params(axis="x", labelsize=7)
    figure.suptitle("SmolLM2-135M-Instruct, two threads, greedy", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
