"""Medians, spreads, and tables of them."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from vllm_di.commands.table import print_table


def times(call: Callable[[], float], runs: int, warm_up: int = 1) -> list[float]:
    """The values of ``runs`` calls after a few that do not count."""
    return [call() for _ in range(warm_up + runs)][warm_up:]


def report(title: str, rows: dict[str, list[float]]) -> None:
    """A table on standard output; ``--json FILE`` on the command line writes the values."""
    print(f"{title}\n")
    table = [
        [name, *(f"{f(values):.3g}" for f in (statistics.median, min, max))]
        for name, values in rows.items()
    ]
    print_table(["figure", "median", "min", "max"], table)
    if "--json" in sys.argv:
        path = Path(sys.argv[sys.argv.index("--json") + 1])
        path.write_text(json.dumps({"title": title, "rows": rows}, indent=2))
