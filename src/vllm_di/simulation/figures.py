"""What a run comes to, in figures."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np

from vllm_di.simulation.fleet import Fleet
from vllm_di.simulation.loop import Outcome
from vllm_di.simulation.split import SimulatedSplit

UNKNOWN = float("nan")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one layout."""

    rows: dict[str, float]
    """Name, with its unit, to value; NaN where there is none."""
    utilisation: list[dict[str, float]]
    """Of each replica: name of a lane (``replica`` where there is one) to the share of the run in
    which it ran steps."""
    notes: list[str]
    """What a reader should know."""


def figures(fleet: Fleet, found: Outcome) -> Figures:
    """Shares and quantiles of a run."""
    seconds = found.seconds or UNKNOWN
    looked_up = sum(stats.prefix_cache_queries for stats in found.stats)
    hits = sum(stats.prefix_cache_hits for stats in found.stats)
    busy = [_busy(replica.executor, seconds) for replica in fleet.replicas]
    rows = {
        "replicas": float(len(fleet.replicas)),
        "ranks": float(fleet.num_ranks),
        "KV blocks of a replica": float(fleet.report.num_blocks),
        "requests answered": float(found.finished),
        "requests refused": float(found.refused),
        "seconds": seconds,
        "requests/s": found.finished / seconds,
        "generated tokens/s": found.generated_tokens / seconds,
        "generated tokens/s of a rank": found.generated_tokens / seconds / fleet.num_ranks,
    }
    rows |= quantiles("first token", found.first, (50, 90, 99))
    rows |= quantiles("between tokens", found.between, (50, 99))
    rows |= quantiles("whole", found.whole, (50, 99))
    rows |= quantiles("in the queue", found.queue, (50, 99))
    rows["prompt tokens from the prefix cache, %"] = 100 * hits / looked_up if looked_up else 0.0
    rows["preemptions"] = float(sum(stats.num_preemptions for stats in found.stats))
    for role in dict.fromkeys(name.split()[0] for name in busy[0]):
        shares = [100 * b for lanes in busy for n, b in lanes.items() if n.split()[0] == role]
        what = "busy" if role == "replica" else f"busy, {role}"
        rows[f"{what}, %: mean"] = float(np.mean(shares))
        if len(shares) > 1:
            rows[f"{what}, %: least"], rows[f"{what}, %: most"] = min(shares), max(shares)
    crossed = sum(
        r.executor.num_crossed for r in fleet.replicas if isinstance(r.executor, SimulatedSplit)
    )
    if len(fleet.timers) > 1:
        rows["handed over, tokens"] = float(crossed)
    return Figures(rows, busy, _notes(fleet, found))


def _busy(executor: object, seconds: float) -> dict[str, float]:
    if isinstance(executor, SimulatedSplit):
        return {lane.name: lane.busy / seconds for lane in executor.lanes}
    return {"replica": executor.busy / seconds}  # type: ignore[attr-defined]


def quantiles(name: str, values: array[float], shares: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds, each under a name with its share; NaN of no values."""
    ordered = np.sort(np.array(values, np.float64))
    return {
        f"{name} p{share}, ms": 1e3 * float(ordered[(len(ordered) - 1) * share // 100])
        if len(ordered)
        else UNKNOWN
        for share in shares
    }


def _notes(fleet: Fleet, found: Outcome) -> list[str]:
    notes = list(fleet.notes)
    for timer in fleet.timers:
        name = f"{timer.name}: " if timer.name else ""
        beyond: Counter[str] = timer.beyond
        for what, count in sorted(beyond.items()):
            notes.append(
                f"{name}{count} of {timer.num_steps} steps are beyond what was measured (up to "
                f"{timer.model.measured(what)}): their time is extrapolated"
            )
    if found.cut:
        notes.append(
            f"{found.cut} requests were drawn longer than the context of "
            f"{fleet.report.max_model_len} tokens, and cut to it"
        )
    for reason, count in sorted(found.reasons.items(), key=lambda item: -item[1])[:3]:
        notes.append(f"{count} requests were refused: {reason}")
    return notes
