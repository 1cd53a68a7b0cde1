"""``vllm-di simulate``: an assembly in virtual time, by step times that ``vllm-di simulate
measure`` took on a real platform. Loads no model, but to measure."""

from __future__ import annotations

import math
import shlex
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_di.commands.arguments import Arguments, UsageError
from vllm_di.commands.say import say, warn
from vllm_di.commands.table import print_table
from vllm_di.containers.assembly import assemble
from vllm_di.containers.overrides import read
from vllm_di.errors import ConfigError, nearest

if TYPE_CHECKING:
    from vllm_di.simulation.figures import Figures
    from vllm_di.simulation.matching import File
    from vllm_di.simulation.step_times import StepTimes
    from vllm_di.simulation.workload import Workload

OF_MEASURING = ("-o", "--repeats", "--clock")
"""Options that only ``measure`` takes. It takes no others."""
WIDEST = 36
"""Characters of a layout that still heads its column."""


def run(arguments: Arguments) -> int:
    """A column for each layout; ``--json FILE`` writes the same as data."""
    words = arguments.words
    if words and words != ["measure"]:
        raise UsageError(
            f"simulate: {words[0]!r} is neither an override nor measure"
            f"{nearest(words[0], ['measure'])}"
        )
    for name in (*arguments.options, *arguments.lists):
        if (name in OF_MEASURING) is not bool(words):
            form = "vllm-di simulate measure" if words else "vllm-di simulate without `measure`"
            raise UsageError(f"{name}: {form} takes no such option")
    return _measure(arguments) if words else _simulate(arguments)


def _measure(arguments: Arguments) -> int:
    from vllm_di.progress import shown
    from vllm_di.simulation.measure import CLOCKS, measure

    path = arguments.options.get("-o")
    if path is None:
        raise UsageError("simulate measure: -o FILE is where the step times go")
    clock = arguments.options.get("--clock", "wall")
    kind = next((known for known in CLOCKS if known == clock), None)
    if kind is None:
        raise UsageError(
            f"--clock: {clock!r} is none of {', '.join(CLOCKS)}{nearest(clock, CLOCKS)}"
        )
    repeats = arguments.number("--repeats", 2)
    assembly = assemble(arguments.overrides, arguments.config_dirs)
    warn(assembly.warnings)
    with shown(say):
        times = measure(assembly, repeats=repeats, clock=kind, progress=_Seldom(5.0))
    if reason := times.lacking():
        raise ConfigError(f"{reason}: raise --repeats, or scheduler.max_num_seqs")
    times.write(Path(path))
    print(f"{path}: {_described(times)}")
    return 0


class _Seldom:
    """Says a line, and then none for some seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            say(text)


def _described(times: StepTimes) -> str:
    error = times.error()
    off = "no step was kept apart to try the fit on"
    if error is not None:
        off = (
            f"of {error.num_steps} steps that the fit did not see it is off by "
            f"{100 * error.median:.1f} % (median) and {100 * error.p90:.1f} % (p90), and of their "
            f"sum by {100 * error.total:+.1f} %"
        )
    ranks = f", {times.ranks} ranks" if times.ranks > 1 else ""
    return (
        f"{times.model} on platform={times.platform}{ranks}, {times.machine}, {times.date}: "
        f"{len(times.steps)} steps; {off}"
    )


def _simulate(arguments: Arguments) -> int:
    from vllm_di.simulation.matching import File
    from vllm_di.simulation.step_times import StepTimes

    paths = arguments.lists.get("--steps", [])
    if not paths:
        raise UsageError(
            "simulate: --steps FILE names the step times of a platform; `vllm-di simulate measure "
            "platform=... -o FILE` takes them"
        )
    load = workload(arguments)
    bandwidth = _bandwidth(arguments)
    files = [File(path, StepTimes.read(path)) for path in map(Path, paths)]
    layouts = arguments.lists.get("--layout", [""])
    results = [(layout, *_one(arguments, layout, files, load, bandwidth)) for layout in layouts]
    for file in files:
        print(f"{file.path}: {_described(file.times)}")
    print(f"{load}\n")
    names = list(dict.fromkeys(name for _, found, _ in results for name in found.rows))
    heads = [layout or "as it is" for layout, _, _ in results]
    if max(map(len, heads)) > WIDEST:
        for number, layout in enumerate(heads, 1):
            print(f"layout {number}: {layout}")
        print()
        heads = [f"layout {number}" for number in range(1, len(heads) + 1)]
    rows = [[n, *(_shown(found.rows.get(n, math.nan)) for _, found, _ in results)] for n in names]
    print_table(["figure", *heads], rows)
    for head, (_, found, _) in zip(heads, results, strict=True):
        for note in found.notes:
            print(f"{head}: {note}" if len(heads) > 1 else note)
    if path := arguments.options.get("--json"):
        _write(Path(path), arguments, load, files, results)
    return 0


def _one(
    arguments: Arguments,
    layout: str,
    files: list[File],
    load: Workload,
    bandwidth: float | None,
) -> tuple[Figures, float]:
    """-> figures, and the real seconds that the run took."""
    from vllm_di.simulation.figures import figures
    from vllm_di.simulation.fleet import open_fleet
    from vllm_di.simulation.loop import Simulation

    try:
        words = shlex.split(layout)
    except ValueError as error:
        raise UsageError(f"--layout {layout!r}: {error}") from None
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise UsageError(
                f"--layout {layout!r}: {word!r} is no override; write key=value or group=option, "
                "such as executor.data_parallel_size=4"
            )
    own = {read(word).key for word in words}  # a layout's word holds, without a warning
    common = [override for override in arguments.overrides if read(override).key not in own]
    assembly = assemble([*common, *words], arguments.config_dirs)
    warn(assembly.warnings)
    begin = time.perf_counter()
    with ExitStack() as stack:
        fleet = open_fleet(assembly, files, bandwidth, stack)
        seldom = _Seldom(10.0)
        found = Simulation(
            fleet, load, lambda text: seldom(f"{layout}: {text}" if layout else text)
        ).run()
        return figures(fleet, found), time.perf_counter() - begin


def workload(arguments: Arguments) -> Workload:
    """Raises UsageError, and ConfigError for a distribution."""
    from vllm_di.simulation.workload import Lengths, Workload

    rate = None
    if "--request-rate" in arguments.options:
        if "--concurrency" in arguments.options:
            raise UsageError(
                "--request-rate and --concurrency: requests come at a rate, or as others end; give "
                "one of the two"
            )
        rate = arguments.real("--request-rate", 0.0)
        if rate <= 0:
            raise UsageError("--request-rate: expected a number above 0")
    prefixes = arguments.number("--prefixes", 0, least=0)
    share = arguments.real("--prefix-share", 1.0)
    if share > 1:
        raise UsageError(f"--prefix-share: expected a share from 0 to 1, got {share:g}")
    for name in ("--prefix-len", "--prefix-share"):
        if name in arguments.options and not prefixes:
            raise UsageError(f"{name}: it counts where --prefixes says how many there are")
    return Workload(
        requests=arguments.number("--num-prompts", 1000),
        rate=rate,
        concurrency=arguments.number("--concurrency", 16),
        input=Lengths.parse(arguments.options.get("--input-len", "128"), "--input-len"),
        output=Lengths.parse(arguments.options.get("--output-len", "64"), "--output-len"),
        prefixes=prefixes,
        prefix_len=arguments.number("--prefix-len", 256) if prefixes else 0,
        prefix_share=share,
        seed=arguments.number("--seed", 0, least=0),
    )


def _bandwidth(arguments: Arguments) -> float | None:
    from vllm_di.components.device.sizes import parse_size

    text = arguments.options.get("--bandwidth")
    return None if text is None else float(parse_size(text.removesuffix("/s"), "--bandwidth"))


def _shown(value: float) -> str:
    if math.isnan(value):
        return ""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}"


def _write(
    path: Path,
    arguments: Arguments,
    load: Workload,
    files: list[File],
    results: list[tuple[str, Figures, float]],
) -> None:
    data: dict[str, Any] = {
        "overrides": arguments.overrides,
        "workload": str(load),
        "steps": [
            {
                "file": str(file.path),
                "machine": file.times.machine,
                "date": file.times.date,
                "platform": file.times.platform,
                "model": file.times.model,
                "fit": file.times.error(),
            }
            for file in files
        ],
        "layouts": [
            {
                "layout": layout,
                "figures": {n: None if math.isnan(v) else v for n, v in found.rows.items()},
                "utilisation": found.utilisation,
                "notes": found.notes,
                "real_seconds": round(seconds, 3),
            }
            for layout, found, seconds in results
        ],
    }
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(data)) + b"\n")
    except OSError as error:
        raise UsageError(
            f"--json {path}: the results cannot be written: {error.strerror}"
        ) from None
