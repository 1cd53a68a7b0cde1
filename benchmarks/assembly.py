"""How long the config takes: compose, check, and fill without loading a weight."""

from __future__ import annotations

import time
from itertools import pairwise

from benchmarks.figures import report
from vllm_di.components.interfaces import Placement
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.schema import check
from vllm_di.containers.slots import GIVEN, EngineContainer, ServerContainer, WorkerContainer

OVERRIDES = ["platform=cpu", "model=tiny"]
DEMO = ["platform=cpu"]


def main() -> None:
    """All three containers; components are imported before the clock starts."""
    rows: dict[str, list[float]] = {
        "compose and resolve, model=tiny, ms": [],
        "compose and resolve, default model, ms": [],
        "check three containers, ms": [],
        "fill the worker's container, model=tiny, ms": [],
    }
    values = list(rows.values())
    for run in range(12):
        begin = time.perf_counter()
        assembly = assemble(OVERRIDES)
        composed = time.perf_counter()
        assemble(DEMO)
        resolved = time.perf_counter()
        for container in (ServerContainer, EngineContainer, WorkerContainer):
            check(container, assembly, replaced=GIVEN[container])
        checked = time.perf_counter()
        with opened(WorkerContainer, assembly, placement=Placement()):
            filled = time.perf_counter()
        if run >= 2:
            marks = (begin, composed, resolved, checked, filled)
            for place, (a, b) in enumerate(pairwise(marks)):
                values[place].append(1e3 * (b - a))
    report("assembly", rows)


if __name__ == "__main__":
    main()
