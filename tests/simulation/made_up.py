"""Step times that nobody measured: simple ones, so that a test can say what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from vllm_di.components.messages import KvGroup, KvSpec, LimitsReport, WorkerReport
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.simulation.fleet import Fleet, open_fleet
from vllm_di.simulation.loop import Outcome, Simulation
from vllm_di.simulation.matching import File
from vllm_di.simulation.shapes import StepShape
from vllm_di.simulation.step_times import MeasuredStep, StepTimes
from vllm_di.simulation.workload import Lengths, Workload

TINY = ["platform=cpu", "model=tiny", "structured_output=none"]
SPLIT = ["platform=split_cpu_cpu", "model=tiny", "structured_output=none"]
DECODE = 0.010
"""Seconds of a step of decodes, however many."""
ROW = 0.001
"""Seconds of a row of a step with prompts."""
BLOCK, BLOCK_BYTES = 16, 1600


def report(num_blocks: int = 1024) -> WorkerReport:
    return WorkerReport(
        block_size=BLOCK,
        num_blocks=num_blocks,
        bytes_per_block=BLOCK_BYTES,
        kv_groups=[KvGroup([0, 1])],
        kv_specs=[KvSpec(layer=layer, num_kv_heads=2, head_size=16) for layer in (0, 1)],
        limits=LimitsReport(),
        max_model_len=2048,
        vocab_size=320,
        eos_token_ids=[257],
        device="none",
        dtype="float32",
        weight_bytes=0,
    )


def steps() -> list[MeasuredStep]:
    decodes = [
        StepShape(n, keys * n, 0, 0, 0.0)
        for n in (1, 2, 4, 8, 16, 32, 48, 64)
        for keys in (0.0, 2000.0)
    ]
    prompts = [
        StepShape(0, 0.0, count, n, keys * n)
        for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        for count in (1, 2)
        for keys in (0.0, 2000.0)
    ]
    return [
        *(MeasuredStep(shape, DECODE, True) for shape in decodes),
        *(MeasuredStep(shape, ROW * shape.prompt_tokens, True) for shape in prompts),
    ]


def times(overrides: Sequence[str] = TINY, num_blocks: int = 1024) -> StepTimes:
    """Of a worker of these overrides."""
    assembly = assemble(overrides)
    return StepTimes(
        machine="none",
        date="2026-11-28",
        version="0",
        platform=assembly.platform.name,
        model="tiny",
        ranks=1,
        worker=assembly.stages[0],
        report=report(num_blocks),
        steps=steps(),
    )


def load(
    count: int,
    *,
    given: str = "32",
    wanted: str = "3",
    at_a_time: int = 2,
    rate: float | None = None,
    prefixes: int = 0,
    prefix_len: int = 0,
    seed: int = 0,
) -> Workload:
    return Workload(
        requests=count,
        rate=rate,
        concurrency=at_a_time,
        input=Lengths.parse(given, "--input-len"),
        output=Lengths.parse(wanted, "--output-len"),
        prefixes=prefixes,
        prefix_len=prefix_len,
        seed=seed,
    )


def run(
    overrides: Sequence[str],
    workload: Workload,
    *,
    bandwidth: float | None = None,
    measured: StepTimes | None = None,
) -> tuple[Fleet, Outcome]:
    files = [File(Path("made-up.json"), measured or times())]
    with ExitStack() as stack:
        fleet = open_fleet(composed(overrides), files, bandwidth, stack)
        return fleet, Simulation(fleet, workload).run()


def composed(overrides: Sequence[str]) -> Assembly:
    return assemble(overrides)
