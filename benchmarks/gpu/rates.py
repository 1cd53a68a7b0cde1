"""Rates of each kernel at Llama-3-8B's shapes, as shares of the device's two limits.

    python -m benchmarks.gpu.rates
    python -m benchmarks.gpu.rates --warm    # compile and run once, for Triton's cache

A row for each: seconds when its inputs may lie in the cache and launches cost nothing (a replayed
graph), seconds of single calls on a cold cache, host seconds of a launch. Attention is measured in
other tiles, stages and splits too: what to tune follows from these rows.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.gpu.attention_cases import Batch
from benchmarks.gpu.cases import Maker, Table
from benchmarks.gpu.limits import bandwidth, matrix_rate, timed
from benchmarks.gpu.processes import Rows
from vllm_di.components.ops.triton import TritonOps

BF16 = torch.bfloat16
TUNED = ("decode 1 x 1024", "decode 64 x 1024", "decode 8 x 8192", "prefill 8 x 2048")
VARIANT = ", rows "
"""Stands in the name of a work that is measured for tuning: its device time alone is."""


@dataclass(frozen=True)
class Work:
    """One kernel at one shape. ``make`` gives the call; made late, since inputs are large."""

    name: str
    make: Callable[[], Callable[[], object]]
    num_bytes: int = 0
    """That it must read and write."""
    flops: int = 0


def works(table: Table, scale: int = 1) -> Iterator[Work]:
    """``scale`` divides the sizes, for a test."""
    for tokens in (1, 64, 16384 // scale):
        yield from _rows(table, tokens)
    for rows in (1, 64 // min(scale, 32)):
        yield from _sampling(table, rows, 128256 // scale)
    for batch in attention(scale):
        yield from _attention(table, batch)


def _rows(table: Table, tokens: int) -> Iterator[Work]:
    ops, make = table.ops, Maker(BF16, table.device)
    size = 2 * tokens  # bytes of one column

    def norm() -> Callable[[], object]:
        x, weight = make.real(tokens, 4096), make.real(4096)
        return lambda: ops.rms_norm(x, weight, 1e-5)

    def add_norm() -> Callable[[], object]:
        x, residual, weight = make.real(tokens, 4096), make.real(tokens, 4096), make.real(4096)
        return lambda: ops.add_rms_norm(x, residual, weight, 1e-5)

    def gate() -> Callable[[], object]:
        x = make.real(tokens, 28672)
        return lambda: ops.silu_and_mul(x)

    def write() -> Callable[[], object]:
        _, k, v = make.qkv(tokens)
        keys, values, slots = make.caches(tokens)
        slots = slots.abs()
        return lambda: ops.write_kv(k, v, keys, values, slots)

    def rotary_write() -> Callable[[], object]:
        q, k, v = make.qkv(tokens)
        keys, values, slots = make.caches(tokens)
        slots, positions, angles = slots.abs(), make.whole(8192, tokens), make.angles()
        return lambda: ops.rotary_write_kv(positions, q, k, v, angles, False, keys, values, slots)

    def product(inputs: int, outputs: int) -> Callable[[], Callable[[], object]]:
        def made() -> Callable[[], object]:
            x, weight = make.real(tokens, inputs), make.real(outputs, inputs)
            return lambda: ops.linear(x, weight)

        return made

    yield Work(f"rms_norm {tokens} x 4096", norm, size * 2 * 4096)
    yield Work(f"add_rms_norm {tokens} x 4096", add_norm, size * 4 * 4096)
    yield Work(f"silu_and_mul {tokens} x 14336", gate, size * 3 * 14336)
    yield Work(f"write_kv {tokens}", write, size * 4 * 1024)
    yield Work(f"rotary_write_kv {tokens}", rotary_write, size * (2 * 4096 + 4 * 1024))
    for inputs, outputs in ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)):
        moved = 2 * (inputs * outputs + tokens * (inputs + outputs))
        flops = 2 * tokens * inputs * outputs
        name = f"linear {tokens} x {inputs} -> {outputs}"
        yield Work(name, product(inputs, outputs), moved, flops)


def _sampling(table: Table, rows: int, vocab: int) -> Iterator[Work]:
    ops, make = table.ops, Maker(torch.float32, table.device)

    def greedy() -> Callable[[], object]:
        logits = make.real(rows, vocab)
        return lambda: ops.greedy_sample(logits)

    def draw(top_k: int, top_p: float, min_p: float) -> Callable[[], Callable[[], object]]:
        def made() -> Callable[[], object]:
            like = {"device": table.device}
            logits = make.real(rows, vocab) * 3
            logits -= logits.amax(-1, keepdim=True)
            k = torch.full((rows,), top_k, **like)
            p, least = torch.full((rows,), top_p, **like), torch.full((rows,), min_p, **like)
            uniform = make.uniform(rows)
            return lambda: ops.top_k_top_p_sample(logits, k, p, least, uniform)

        return made

    moved = 4 * rows * vocab
    yield Work(f"greedy_sample {rows} x {vocab}", greedy, moved)
    for name, settings in {
        "plain": (vocab, 1.0, 0.0),
        "top_k 50": (50, 1.0, 0.0),
        "top_p 0.9": (vocab, 0.9, 0.0),
        "top_k 50 top_p 0.9": (50, 0.9, 0.0),
        "min_p 0.1": (vocab, 1.0, 0.1),
    }.items():
        yield Work(f"top_k_top_p_sample {rows} x {vocab}, {name}", draw(*settings), moved)


def attention(scale: int = 1) -> Iterator[Batch]:
    common: dict[str, Any] = {"heads": (32, 8), "size": 128, "block": 32, "dtype": BF16}
    for batch, context in ((1, 1024), (64, 1024), (1, 8192), (8, 8192)):
        loads = ((1, context // scale),) * batch
        what = f"decode {batch} x {context // scale}"
        yield Batch(loads, what=what, programs=None, **common)
    length = 2048 // scale
    yield Batch(((length, length),) * 8, what=f"prefill 8 x {length}", programs=None, **common)
    chunk = ((512 // scale, 4096 // scale),) * 4
    yield Batch(chunk, what="chunk 4 x 512 of 4096", programs=None, **common)


def _moved(batch: Batch) -> tuple[int, int]:
    """(bytes, operations) that the call needs."""
    query, kv = batch.heads
    keys = sum(context for _, context in batch.loads)
    tokens = sum(queries for queries, _ in batch.loads)
    size = 2 * batch.size * (2 * keys * kv + 2 * tokens * query)
    pairs = sum(q * (c - q) + q * (q + 1) // 2 for q, c in batch.loads)
    return size, 4 * pairs * query * batch.size


def _attention(table: Table, batch: Batch) -> Iterator[Work]:
    num_bytes, flops = _moved(batch)

    def with_ops(ops: TritonOps) -> Callable[[], Callable[[], object]]:
        def made() -> Callable[[], object]:
            arguments = batch.make(table.device)
            return lambda: ops.paged_attention(*arguments)

        return made

    yield Work(f"attention {batch.what}", with_ops(table.of(None)), num_bytes, flops)
    if batch.what not in TUNED:
        return
    for name, ops in tuned(table, decode=batch.loads[0][0] == 1):
        yield Work(f"attention {batch.what}, {name}", with_ops(ops), num_bytes, flops)


def tuned(table: Table, *, decode: bool) -> Iterator[tuple[str, TritonOps]]:
    """Libraries with another tile, number of stages or of programs."""
    multiprocessors = _multiprocessors(table)
    rows = (16,) if decode else (64, 128)
    programs = (2, 4, 8) if decode else (4,)
    choices = itertools.product(rows, (32, 64, 128), (4, 8), (2, 3, 4), programs)
    for row, columns, warps, stages, share in choices:
        if decode and (stages == 2 or (warps == 8 and columns == 32)):
            continue
        if not decode and (columns == 32 or (row == 64 and warps == 8)):
            continue
        ops = TritonOps(programs=share * multiprocessors, num_stages=stages)
        name = f"rows {row} columns {columns} warps {warps} stages {stages} programs {share} x"
        yield name, _with_tile(ops, row, columns, warps)


def _with_tile(ops: TritonOps, rows: int, columns: int, num_warps: int) -> TritonOps:
    from vllm_di.kernels.triton.tiles import Tile

    tile = Tile(rows, columns, num_warps)
    ops._tiling = SimpleNamespace(tile=lambda *_sizes: tile)  # a cached property: this stands first
    return ops


def _multiprocessors(table: Table) -> int:
    if table.device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(table.device).multi_processor_count


# ------------------------------------------------------------------------------------------------
# timing


def replayed(call: Callable[[], object], calls: int) -> float:
    """Device seconds of one of ``calls`` calls in a graph: no launch is waited for."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    return min(timed("cuda", graph.replay) for _ in range(5)) / calls


def cold(call: Callable[[], object], runs: int = 8) -> float:
    """Median device seconds of one call after 128 MiB of other data went through the cache."""
    other = torch.empty(2**27, dtype=torch.int8, device="cuda")
    found = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)


def launching(call: Callable[[], object], calls: int = 20) -> float:
    """Host seconds of a call that waits for nothing."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = (time.perf_counter() - begin) / calls
    torch.cuda.synchronize()
    return seconds


def measure(work: Work, table: Table) -> dict[str, float]:
    call = work.make()
    first = timed(str(table.device), call)
    if table.device.type != "cuda":
        return {"seconds": timed(str(table.device), call), "first": first}
    once = timed("cuda", call)
    calls = max(2, min(50, int(5e-3 / max(once, 1e-5))))
    found = {"seconds": replayed(call, calls), "first": first}
    if VARIANT not in work.name:
        found |= {"cold": cold(call), "launch": launching(call)}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="rates of each kernel")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--warm", action="store_true", help="compile and run once, untimed")
    parser.add_argument("--share", default="0/1", help="N/M: the works N, N + M, ...")
    parser.add_argument("--scale", type=int, default=1, help="divides sizes")
    parser.add_argument("--match", default="", help="works whose name holds this alone")
    parser.add_argument("--bandwidth-bytes", type=int, default=4 * 2**30)
    parser.add_argument("--matrix-size", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    row, table = Rows(options.out), Table(options.device)
    if not options.warm:
        moved = bandwidth(options.device, options.bandwidth_bytes)
        done = matrix_rate(options.device, options.matrix_size)
        row(name="memory bandwidth", value=moved / 1e9, unit="GB/s")
        row(name="bf16 matrix rate", value=done / 1e12, unit="TFLOP/s")
    first, of = map(int, options.share.split("/"))
    listed = [work for work in works(table, options.scale) if options.match in work.name]
    # variants come last: the plain rows are wanted first
    listed.sort(key=lambda work: VARIANT in work.name)
    for work in itertools.islice(listed, first, None, of):
        try:
            with torch.inference_mode():
                if options.warm:
                    timed(options.device, work.make())
                    continue
                found = measure(work, table)
        except Exception as error:  # one that does not compile tells something too
            trace = traceback.format_exc()[-1500:]
            verdict = {} if VARIANT in work.name else {"passed": False}
            text = f"{type(error).__name__}: {error}"[:600]
            row(name=work.name, **verdict, error=text, trace=trace)
            continue
        seconds = found["seconds"]
        rates: dict[str, float] = {}
        if work.num_bytes:
            rates |= {"GB/s": work.num_bytes / seconds / 1e9}
            rates |= {"of bandwidth": work.num_bytes / seconds / moved}
        if work.flops:
            rates |= {"TFLOP/s": work.flops / seconds / 1e12}
            rates |= {"of matrix rate": work.flops / seconds / done}
        rounded = {key: float(f"{value:.4g}") for key, value in (found | rates).items()}
        row(name=work.name, **rounded)
    return 0


if __name__ == "__main__":
    sys.exit(main())
