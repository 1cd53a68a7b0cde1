"""The bar chart of the README."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.works import TITLES, Figure

COLOURS = {
    "vllm-di": "#1f6feb",
    "llama.cpp": "#8b949e",
    "OpenVINO": "#b08800",
    "vLLM": "#2da44e",
    "transformers": "#bc4c00",
}
COLUMNS = 4


def draw(figures: list[Figure], file: Path, machine: str) -> None:
    """One panel for each row of the table, a bar for each engine and kind of weights, from zero;
    a line from the lowest to the highest value."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figures = [f for f in figures if f.values]
    rows = list(dict.fromkeys(f.row for f in figures))
    bars_of = {row: sum(f.row == row for f in figures) for row in rows}
    height = -(-len(rows) // COLUMNS)
    most = [max(bars_of[row] for row in rows[i * COLUMNS :][:COLUMNS]) for i in range(height)]
    page, panels = plt.subplots(
        height,
        COLUMNS,
        figsize=(4.1 * COLUMNS, sum(0.25 * n + 0.75 for n in most) + 0.5),
        height_ratios=[n + 1 for n in most],
        squeeze=False,
    )
    for panel in panels.flat[len(rows) :]:
        panel.axis("off")
    for number, (panel, row) in enumerate(zip(panels.flat, rows, strict=False)):
        bars = [f for f in figures if f.row == row]
        places = range(len(bars))
        largest = max(max(f.values) for f in bars)
        panel.barh(places, [f.median for f in bars], color=[COLOURS[f.engine] for f in bars])
        for place, bar in enumerate(bars):
            low, high = min(bar.values), max(bar.values)
            panel.plot([low, high], [place, place], color="#24292f", linewidth=1.2)
            text = f"{bar.median:,.0f}" if bar.median >= 20 else f"{bar.median:.1f}"
            panel.text(high + 0.02 * largest, place, text, va="center", fontsize=7)
        panel.set_yticks(places, [f"{f.engine} {f.weights}" for f in bars], fontsize=7.5)
        panel.set_ylim(most[number // COLUMNS] - 0.4, -0.6)  # bars as thick as their neighbours'
        panel.set_xlim(0, 1.18 * largest)
        more = "more" if bars[0].unit == "tokens/s" else "less"
        panel.set_title(f"{TITLES[row]}\n{bars[0].unit}, {more} is better", fontsize=8.5)
        panel.tick_params(axis="x", labelsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    page.suptitle(
        f"{machine}. SmolLM2-135M-Instruct where no other model is named; two threads, greedy; "
        "OpenVINO's bf16 is its fp16 export, llama.cpp's int8 is Q8_0, 4-bit is the shipped Q4_1",
        fontsize=10,
    )
    page.tight_layout()
    page.savefig(file, dpi=110)
