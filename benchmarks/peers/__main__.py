"""``make bench-peers``: the table beside the peers, in turns.

Options: ``--only llama.cpp,OpenVINO`` engines, ``--rows decode-1,start,server``, ``--rounds 3``,
``--weights bf16,int8,4-bit``. What was measured replaces the same rows in
``benchmarks/peers/results.json``; ``python -m benchmarks.peers.report`` writes the tables and the
chart from that file.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks.peers import engines, report, servers
from benchmarks.peers.environments import SetupError, tcmalloc
from benchmarks.peers.roofline import Roofline, measure
from benchmarks.peers.works import (
    SMOLLM2,
    WEIGHTS,
    WORKS,
    Figure,
    Work,
    limit,
    server_limit,
)
from vllm_di.commands.bench import prompts
from vllm_di.components.device.system import allowed_cores, cpu_name

RESULTS = Path(__file__).parent / "results.json"
ROWS = [*(work.name for work in WORKS), "server", "start"]
TCMALLOC = {True: "vLLM with tcmalloc.", False: "vLLM without tcmalloc: not installed."}
QUICK = 20.0
"""Seconds: a start that takes longer is not repeated."""


def measured(weights: str, rows: list[str], rounds: int, only: set[str]) -> Iterator[list[Figure]]:
    """Row after row, without the limits, which need the machine's roofline."""
    works = [work for work in WORKS if work.name in rows and weights in work.model.bytes]
    for name in dict.fromkeys(work.model.name for work in works):
        of_model = [work for work in works if work.model.name == name]
        with engines.running(weights, of_model[0].model, only) as running:
            for work in of_model:
                yield compare(work, weights, rounds, running)
    if "server" in rows:
        yield serve(weights, rounds, only)
    if "start" in rows:
        yield start(weights, rounds, only)


# -- libraries ---------------------------------------------------------------------------------


def compare(work: Work, weights: str, rounds: int, running: list[engines.Engine]) -> list[Figure]:
    """Each engine in turn, in each round; a short round before them warms up."""
    figures = {
        e.name: Figure(work.name, weights, e.name, work.unit, by_steps=True) for e in running
    }
    for seed in range(rounds + 1):
        for engine in running:
            figure = figures[engine.name]
            try:
                if seed:
                    figure.values.append(rate(engine, work, seed))
                else:
                    engine.times(asked(work, seed), min(work.new, 4))
            except SetupError as error:
                figure.failed = str(error)
    return list(figures.values())


def asked(work: Work, seed: int) -> list[list[int]]:
    """No two rows and rounds share a beginning: some engines keep their prefix cache."""
    place = WORKS.index(work) * 1000 + seed
    return prompts(work.batch, work.given, work.model.vocab_size, place)


def rate(engine: engines.Engine, work: Work, seed: int) -> float:
    """Of one round: tokens a second; milliseconds to the first token of a prompt in the cache.

    Decode is by the median step that gave every prompt a token, so that a disturbed one does not
    count."""
    ids = asked(work, seed)
    times = engine.times(ids, work.new)
    if work.cached:
        return 1e3 * engine.times(ids, 1, keep=True)[0][0]
    if work.new == 1:
        return work.batch * work.given / max(t[0] for t in times)
    ready = max(t[0] for t in times)
    steps = [b - a for t in times for a, b in itertools.pairwise(t) if a >= ready]
    return work.batch / statistics.median(steps)


def start(weights: str, rounds: int, only: set[str]) -> list[Figure]:
    """A new process for each round: its first token, and its memory after a prompt of 128."""
    figures = []
    [prompt] = prompts(1, 128, SMOLLM2.vocab_size, 1)
    with engines.running(weights, SMOLLM2, only) as running:
        for engine in running:
            seconds = Figure("start", weights, engine.name, "s")
            memory = Figure("memory", weights, engine.name, "MB")
            try:
                warm_up = engine.first_token(prompt)  # fills caches: of files, of compiled code
                repeats = range(rounds) if warm_up < QUICK else ()
                seconds.values = [] if repeats else [warm_up]
                memory.values = [] if repeats else [engine.memory() / 1e6]
                for _ in repeats:
                    seconds.values.append(engine.first_token(prompt))
                    memory.values.append(engine.memory() / 1e6)
            except SetupError as error:
                seconds.failed = memory.failed = str(error)
            engine.close()
            figures += [seconds, memory]
    return figures


# -- servers -----------------------------------------------------------------------------------


def serve(weights: str, rounds: int, only: set[str]) -> list[Figure]:
    names = {
        "generated tokens/s": "server",
        "first token p50, ms": "server-ttft-p50",
        "first token p99, ms": "server-ttft-p99",
        "between tokens p50, ms": "server-itl-p50",
        "between tokens p99, ms": "server-itl-p99",
    }
    units = {row: "tokens/s" if row == "server" else "ms" for row in names.values()}
    figures: dict[tuple[str, str], Figure] = {}
    with servers.chosen(weights, only) as chosen:
        for server in chosen:
            rows = {row: Figure(row, weights, server.name, unit) for row, unit in units.items()}
            rows["server-start"] = Figure("server-start", weights, server.name, "s")
            figures |= {(server.name, row): figure for row, figure in rows.items()}
            begun = rows["server-start"]
            try:
                begun.values = [server.start()]
                while begun.values[0] < QUICK and len(begun.values) < rounds:
                    begun.values.append(server.start())
                server.pause()
            except SetupError as error:
                begun.failed = str(error)
        for seed in range(rounds + 1):  # the first one warms up
            for server in chosen:
                if failed := figures[server.name, "server-start"].failed:
                    for row in units:
                        figures[server.name, row].failed = failed
                    continue
                found = server.measure(seed)
                for name, row in names.items() if seed else ():
                    figures[server.name, row].values.append(found[name])
    return list(figures.values())


# ----------------------------------------------------------------------------------------------


def bounded(figures: list[Figure], weights: str, roofline: Roofline) -> None:
    """Fills in the limits."""
    works = {work.name: work for work in WORKS}
    for figure in figures:
        if figure.row in works and not works[figure.row].cached:
            figure.limit = limit(works[figure.row], weights, roofline)
        elif figure.row == "server":
            figure.limit = server_limit(weights, roofline)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.peers")
    parser.add_argument("--only", default="", help="engines, with commas")
    parser.add_argument("--rows", default=",".join(ROWS), help="rows, with commas")
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    rows, kinds = given.rows.split(","), given.weights.split(",")
    only = set(filter(None, given.only.split(",")))
    for option, values, known in (("--rows", rows, ROWS), ("--weights", kinds, WEIGHTS)):
        if unknown := set(values) - set(known):
            parser.error(f"{option}: {', '.join(unknown)} is none of {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # engines are ended on the way out
    results = report.read(RESULTS)
    cores = f"{cpu_name()}, {len(allowed_cores())} cores"
    machine = results.here(cores, datetime.date.today().isoformat())
    machine.notes = [TCMALLOC[bool(tcmalloc())]]
    for weights in kinds:
        before = measure()
        for figures in measured(weights, rows, given.rounds, only):
            after = measure()
            roofline, before = before.better(after), after
            bounded(figures, weights, roofline)
            machine.replace(figures, roofline)
            RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
            report.show(figures)
            sys.stdout.flush()
    report.show_goals(machine)
    report.write(results)


if __name__ == "__main__":
    main()
