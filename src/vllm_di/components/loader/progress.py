"""A progress bar over tensors, for people who watch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any


def shown(weights: Iterator[tuple[str, Any]], wanted: bool) -> Iterator[tuple[str, Any]]:
    """The same tensors; with a bar on standard error when it is a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield from weights
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(weights, description="loading weights", console=console, transient=True)
