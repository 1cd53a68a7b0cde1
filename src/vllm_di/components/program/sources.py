"""What torch keeps of the graphs that were made."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager

from torch.fx import graph_module


@contextmanager
def sources_dropped() -> Iterator[None]:
    """torch.fx keeps the source of every graph for the life of the process, for tracebacks, 20 KB
    each for a tiny model. Those of the block are dropped at its end."""
    kept = graph_module._loader.eval_cache
    before = set(kept)
    try:
        yield
    finally:
        for name in [name for name in kept if name not in before]:
            kept.pop(name, None)
            linecache.cache.pop(name, None)
