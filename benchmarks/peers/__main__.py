"""``make bench-peers``: the work table beside the peers, in turns; a report and a chart.

Options: ``--only llama.cpp,OpenVINO`` peers, ``--rows decode-1,prefill-1x1024``, ``--rounds 3``,
``--weights bf16,int8,4-bit``. Results go to ``benchmarks/peers/results.json`` and
``docs/peers.png``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import msgspec

from benchmarks.peers.chart import draw
from benchmarks.peers.engines import Engine, running
from benchmarks.peers.environments import ROOT, SetupError
from benchmarks.peers.roofline import Roofline, measure
from vllm_di.commands.bench import prompts
from vllm_di.commands.table import print_table

RESULTS = Path(__file__).parent / "results.json"
VOCABULARY = 40_000
BYTES = {"bf16": 269e6, "int8": 135e6, "4-bit": 98e6}
"""Of the weights that a decode step reads (SmolLM2-135M)."""
LAYERS = 106.2e6
"""Weights of the layers: a token of a prompt multiplies each once."""
KV_BYTES = 30 * 2 * 3 * 64 * 2
"""Of a token in the cache, bf16."""


class Work(msgspec.Struct, frozen=True):
    name: str
    batch: int
    given: int
    new: int
    """Tokens of an answer; 1: the prefill is measured, else the decode after it."""


WORKS = [
    Work("decode-1", 1, 128, 65),
    Work("decode-8", 8, 128, 65),
    Work("decode-32", 32, 128, 65),
    Work("prefill-8x512", 8, 512, 1),
    Work("prefill-1x1024", 1, 1024, 1),
]


class Result(msgspec.Struct):
    work: str
    weights: str
    engine: str
    rates: list[float] = []
    """Tokens a second, one for each round."""
    failed: str = ""
    bound: float = 0.0
    """What this machine allows, tokens a second."""
    memory: int = 0

    @property
    def rate(self) -> float:
        return statistics.median(self.rates) if self.rates else 0.0


def rate(engine: Engine, work: Work, seed: int) -> float:
    """Tokens a second of one round."""
    ids = prompts(work.batch, work.given, VOCABULARY, seed)
    if work.new == 1:
        return work.batch * work.given / engine.seconds(ids, 1)
    first, whole = engine.seconds(ids, 1), engine.seconds(ids, work.new)
    return work.batch * (work.new - 1) / (whole - first)


def bound(work: Work, weights: str, roofline: Roofline) -> float:
    """Decode: weights and KV read once a step, or the products, whichever takes longer. Prefill:
    products of the layers and attention."""
    speed = roofline.bf16 if weights == "bf16" else roofline.int8
    if work.new == 1:
        attention = 30 * 4 * 576 * work.given / 2  # operations of a token, all layers
        return 1 / (2 * LAYERS / speed + attention / roofline.bf16)
    context = work.given + work.new / 2
    read = (BYTES[weights] + work.batch * context * KV_BYTES) / roofline.read
    products = 2 * (LAYERS + 28.3e6) * work.batch / speed
    return work.batch / max(read, products)


def compare(
    weights: str, works: list[Work], rounds: int, only: set[str], roofline: Roofline
) -> list[Result]:
    found = []
    with running(weights, only) as engines:
        for work in works:
            results = {e.name: Result(work.name, weights, e.name) for e in engines}
            for seed in range(rounds + 1):
                for engine in engines:
                    result = results[engine.name]
                    try:
                        value = rate(engine, work, seed)
                        result.rates += [value] if seed else []  # the first one warms up
                        result.memory = engine.memory()
                    except SetupError as error:
                        result.failed = str(error)
            for result in results.values():
                result.bound = bound(work, weights, roofline)
            found += results.values()
            show(list(results.values()))
    return found


def show(results: list[Result]) -> None:
    rows, ours = [], results[0].rate
    for r in results:
        if r.failed:
            rows.append([r.work, r.weights, r.engine, f"not run: {r.failed}"[:60], "", "", ""])
            continue
        spread = f"{min(r.rates):,.0f} to {max(r.rates):,.0f}"
        share, ratio = f"{r.rate / r.bound:.0%}", f"{ours / r.rate:.2f}"
        rows.append([r.work, r.weights, r.engine, f"{r.rate:,.0f}", spread, ratio, share])
    print_table(["work", "weights", "engine", "tokens/s", "spread", "ours is", "of limit"], rows)
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.peers")
    parser.add_argument("--only", default="", help="peers, with commas")
    parser.add_argument("--rows", default="", help="rows, with commas")
    parser.add_argument("--weights", default="bf16,int8,4-bit")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    names = set(filter(None, given.rows.split(",")))
    works = [work for work in WORKS if not names or work.name in names]
    roofline = measure()
    print(
        f"limits: {roofline.read / 1e9:.1f} GB/s read, {roofline.bf16 / 1e9:.0f} GFLOP/s bf16, "
        f"{roofline.int8 / 1e9:.0f} GOP/s int8\n"
    )
    results: list[Result] = []
    only = set(filter(None, given.only.split(",")))
    for weights in given.weights.split(","):
        results += compare(weights, works, given.rounds, only, roofline)
    RESULTS.write_bytes(
        msgspec.json.format(msgspec.json.encode({"roofline": roofline, "results": results}))
    )
    draw(results, ROOT / "docs/peers.png")


if __name__ == "__main__":
    main()
