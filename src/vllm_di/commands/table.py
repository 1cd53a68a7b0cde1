"""Plain text tables: columns as wide as they need to be, and names that fit into them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[object]], out: TextIO | None = None
) -> None:
    """Left-aligned columns; numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(head), *cells]) for i in range(len(head))]
    numeric = [all(_is_number(r[i]) for r in cells) for i in range(len(head))] if cells else []
    lines = [list(head), ["-" * w for w in widths], *cells]
    for n, line in enumerate(lines):
        parts = [
            text.rjust(width) if numeric and numeric[i] and n != 1 else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(parts).rstrip(), file=out or sys.stdout)


def short_name(target: str) -> str:
    """A class's path without the part that all components of this project share."""
    return target.removeprefix("vllm_di.components.").removeprefix("vllm_di.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
