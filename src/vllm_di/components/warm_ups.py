"""What workers measured while they warmed up: put together, and as a line of text."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_di.components.device.sizes import show_size
from vllm_di.components.messages import WarmUp, WorkerReport


def warmed(report: WorkerReport, workers: Sequence[WarmUp | None]) -> WorkerReport:
    """The report of all workers, now that each has warmed up."""
    known = [one for one in workers if one is not None]
    if not known:
        return report
    sizes = [one.program_bytes for one in known if one.program_bytes is not None]
    together = WarmUp(
        seconds=max(one.seconds for one in known),
        num_programs=sum(one.num_programs for one in known),
        program_bytes=sum(sizes) if len(sizes) == len(known) else None,
    )
    return msgspec.structs.replace(report, warm_up=together)


def shown(one: WarmUp) -> str:
    """``1.2 s, 39 programs, 120 MiB of memory``"""
    size, known = "memory unknown", one.program_bytes
    if known is not None:
        size = f"{show_size(known)} of memory"
    return f"{one.seconds:.1f} s, {one.num_programs} programs, {size}"
