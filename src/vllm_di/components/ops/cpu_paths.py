"""Which way to multiply is the fastest on this CPU, for few and for many rows: measured once and
kept, so that the choice, and with it the last bits of a sum, stay the same from day to day."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from vllm_di.cache import is_whole, obtain

log = logging.getLogger(__name__)

ROWS = (1, 4, 8, 16, 32, 128)
INPUTS, OUTPUTS = 1024, 2048
"""Of the weight that is multiplied: 4 MB in bf16, more than a second-level cache holds."""
BUDGET = 0.8
"""Seconds after which no further round begins."""
ROUNDS = 5
WORTH_SAYING = 1.2
"""Times as fast that a path must be to be pointed out."""
VERSION = 1
"""Of the file's form and of what is measured."""
TILES, ONEDNN = "tiles", "oneDNN"


class Candidate(NamedTuple):
    """A way to multiply [rows, INPUTS] by [INPUTS, OUTPUTS]."""

    dtype: str
    path: str
    run: Callable[[int], object]
    """Multiplies so many rows."""


class Figure(msgspec.Struct, frozen=True):
    """The best of some rounds."""

    dtype: str
    path: str
    rows: int
    gflops: float


class Measured(msgspec.Struct, frozen=True):
    """What was found on a CPU. ``threads``: those that it was measured with."""

    cpu: str
    threads: int
    figures: list[Figure]

    def rows_for_tiles(self, dtype: str) -> int | None:
        """From how many rows on tile registers are faster than the other kernel, at all numbers of
        rows that were measured; None where they never are."""
        least = None
        for rows in sorted(ROWS, reverse=True):
            found = {f.path: f.gflops for f in self.figures if f.rows == rows and f.dtype == dtype}
            own = [gflops for path, gflops in found.items() if path not in (TILES, ONEDNN)]
            if TILES not in found or found[TILES] < max(own):
                break
            least = rows
        return least

    def describe(self, dtypes: Sequence[str]) -> str:
        """Figures for few and for many rows, and a hint where oneDNN is faster."""
        few, many = ROWS[0], ROWS[-1]
        parts, hints = [], []
        for dtype in dtypes:
            best: dict[str, dict[int, float]] = {}
            for f in self.figures:
                if f.dtype == dtype:
                    best.setdefault(f.path, {})[f.rows] = f.gflops
            rates = [f"{path} {of[few]:.3g} and {of[many]:.3g}" for path, of in best.items()]
            parts += [f"{dtype} {', '.join(rates)}"] if rates else []
            own = max((of[many] for path, of in best.items() if path != ONEDNN), default=0.0)
            if own and ONEDNN in best and (times := best[ONEDNN][many] / own) > WORTH_SAYING:
                hints.append(f"{times:.1f} times as fast in {dtype}")
        text = f"GFLOP/s at {few} and {many} rows: {'; '.join(parts)}"
        if hints:
            text += f"; oneDNN is {' and '.join(hints)}: ops.library.rows_for_onednn={many} uses it"
        return text


def cpu_model() -> str:
    """What /proc/cpuinfo calls it, with its stepping; on ARM by numbers alone."""
    x86 = ("vendor_id", "cpu family", "model", "model name", "stepping")
    arm = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision")
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    pairs = [line.partition(":") for line in lines]
    return ", ".join(value.strip() for key, _, value in pairs if key.strip() in x86 + arm)


def place(cache: Path, library: str) -> Path:
    """Where the figures of a library (the name of its file) on this CPU are kept."""
    key = "\0".join((str(VERSION), cpu_model(), library))
    return cache / f"paths-{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"


def kept(path: Path) -> Measured | None:
    """What is there, if it is whole. A warning says why a file that is there is not used."""
    if not is_whole(path):
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Measured)
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s: %s: it is not used", path, error)
        return None


def measured(path: Path, candidates: Callable[[], list[Candidate]], threads: int) -> Measured:
    """From the cache, or found now. Where the cache cannot be written a warning says that another
    start may choose otherwise."""
    fresh: list[Measured] = []

    def make(to: Path) -> None:
        fresh.append(measure(candidates(), threads))
        to.write_bytes(msgspec.json.format(msgspec.json.encode(fresh[0])))

    try:
        found = kept(obtain(path, make))
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): the ways to multiply are measured at each start, and may "
            "change from one to the next",
            path,
            error.strerror or error,
        )
        found = None
    return found or (fresh[0] if fresh else measure(candidates(), threads))


def measure(candidates: list[Candidate], threads: int) -> Measured:
    """In turns, so that what else runs on the machine meets all of them; the best of each."""
    best: dict[tuple[str, str, int], float] = {}
    start = time.perf_counter()
    for _ in range(ROUNDS):
        for rows in ROWS:
            for dtype, path, run in candidates:
                begin = time.perf_counter()
                run(rows)
                took = time.perf_counter() - begin
                key = dtype, path, rows
                best[key] = min(best.get(key, took), took)
        if time.perf_counter() - start > BUDGET:
            break
    figures = [
        Figure(dtype, path, rows, round(2e-9 * rows * INPUTS * OUTPUTS / took, 2))
        for (dtype, path, rows), took in best.items()
    ]
    return Measured(cpu_model(), threads, figures)
