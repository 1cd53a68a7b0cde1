"""Times the steps of a real engine, whose scheduler and workers are driven to steps of many
shapes."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import msgspec
import numpy as np

from vllm_di.components.device import system
from vllm_di.components.engine.standard import StandardEngine
from vllm_di.components.interfaces import Engine, Executor
from vllm_di.components.messages import (
    EngineRequest,
    Peer,
    SamplingParams,
    StepPlan,
    StepResult,
    WorkerReport,
)
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.fill import Launcher, opened
from vllm_di.containers.schema import check
from vllm_di.containers.slots import EngineContainer
from vllm_di.errors import ConfigError, VllmDiError
from vllm_di.simulation.fleet import refuse_drafts
from vllm_di.simulation.shapes import Shaper
from vllm_di.simulation.step_times import MeasuredStep, StepTimes
from vllm_di.simulation.workload import Lengths, Workload, requests
from vllm_di.version import __version__

DECODES = 12
"""Steps of decodes alone that each batch runs."""
SHORT = 16
"""Tokens of a prompt that is there for its decodes."""
NEAR = 0.15
"""A prompt is up to this share shorter than its batch says."""
KEPT_APART = 32
"""Requests of the last run, none of whose steps the fit sees."""

ClockKind = Literal["wall", "processor"]
CLOCKS: dict[ClockKind, Callable[[], float]] = {
    "wall": time.perf_counter,
    "processor": time.process_time,
}
"""By which steps are timed. ``processor``: seconds that this process computed, of all its threads:
for an engine of one thread on a machine where others compute too."""


class Batch(msgspec.Struct, frozen=True):
    """Requests that come at the same time."""

    prompts: list[int]
    """Tokens of each."""
    output: int
    """Tokens of each answer."""
    joining: list[int] = []
    """Prompts that come while the first are decoding, of one token of answer."""


def batches(report: WorkerReport, max_num_seqs: int, max_tokens: int) -> Iterator[Batch]:
    """Steps of decodes by number and context, of prompts by number, length and context, and of both
    together, as far as the engine goes."""
    most = report.max_model_len - DECODES - 1
    room = report.block_size * (report.num_blocks - 1)

    def fits(*lengths: int) -> bool:
        blocks = sum(-(-(n + DECODES + 1) // report.block_size) for n in lengths)
        return max(lengths) <= most and blocks * report.block_size <= room

    counts = sorted({*_doubling(1, max_num_seqs), max_num_seqs})
    yield from (Batch([SHORT] * n, DECODES) for n in counts if fits(*[SHORT] * n))
    for count, length in ((1, 1024), (4, 512), (max(1, max_num_seqs // 4), 256)):
        length = min(length, most)
        if count <= max_num_seqs and fits(*[length] * count):
            yield Batch([length] * count, DECODES)
    for tokens in sorted({*_doubling(SHORT, max_tokens), max_tokens, 3 * max_tokens // 4}):
        if fits(tokens):
            yield Batch([tokens], 1)
        for count in (4, 16):
            each = [tokens // count] * count
            if each[0] >= 8 and count <= max_num_seqs and fits(*each):
                yield Batch(each, 1)
    for count in (1, max(1, max_num_seqs // 8), max(1, max_num_seqs // 2)):
        joining = [length for length in (40, 150, 400) if length <= most]
        if count < max_num_seqs and fits(*[SHORT] * count, *joining):
            yield Batch([SHORT] * count, 2 * DECODES, joining)


def _doubling(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


def measure(
    assembly: Assembly,
    *,
    repeats: int = 2,
    clock: ClockKind = "wall",
    progress: Callable[[str], None] = lambda text: None,
) -> StepTimes:
    """Of the engine of an assembly, in this process. Raises ConfigError."""
    check(EngineContainer, assembly, replaced=["launcher"])
    _refuse(assembly)
    launcher = Launcher(assembly)
    with opened(EngineContainer, assembly, launcher=launcher, only=["executor"]) as inner:
        recorder = Recorder(inner.executor())
        with opened(EngineContainer, assembly, launcher=launcher, executor=recorder) as outer:
            engine = outer.engine()
            refuse_drafts(outer.drafter(), assembly)
            if isinstance(engine, StandardEngine):
                engine.clock = CLOCKS[clock]  # by which the scheduler paces prompts
            node = assembly.engine["scheduler"]
            drive = _Drive(engine, recorder, CLOCKS[clock])
            plan = list(
                batches(
                    engine.report,
                    _limit(node, "max_num_seqs"),
                    _limit(node, "max_num_batched_tokens"),
                )
            )
            drive.run(plan[0])  # the first steps of a process are slower
            drive.steps.clear()
            for number in range(repeats):
                for index, batch in enumerate(plan):
                    drive.run(batch)
                    progress(f"round {number + 1} of {repeats}: {index + 1} of {len(plan)} batches")
            drive.run_apart(engine.report, seed=1)
            drive.forget_apart()  # shapes of steps are known now, as they are to a server
            drive.run_apart(engine.report, seed=2)
            return StepTimes(
                machine=f"{system.cpu_name()}, {system.usable_cores()} cores",
                date=datetime.datetime.now(datetime.UTC).date().isoformat(),
                version=__version__,
                platform=assembly.platform.name,
                model=assembly.settings["model_name"] or assembly.choices["model"].option,
                ranks=int(assembly.engine["executor"].get("tensor_parallel_size", 1)),
                worker=assembly.stages[0],
                report=msgspec.structs.replace(engine.report, details={}),
                steps=drive.steps,
            )


def _limit(node: dict[str, Any], key: str) -> int:
    value = node.get(key)
    if not isinstance(value, int):
        raise ConfigError(
            f"scheduler.{key}: this scheduler has none, so that it is not known up to where to "
            "measure; take scheduler=continuous"
        )
    return value


def _refuse(assembly: Assembly) -> None:
    """Raise ConfigError for what has no step times of its own."""
    name, origin = assembly.platform.name, assembly.choices["platform"].origin
    if len(assembly.workers) > 1 or len(assembly.stages) > 1:
        raise ConfigError(
            f"{origin}: platform={name} is made of several: measure the platform of each role alone"
        )


class Recorder(Executor):
    """Hands everything on, and keeps the last plan."""

    def __init__(self, executor: Executor) -> None:
        self._executor, self.depth, self.patience = executor, executor.depth, executor.patience
        self.plan: StepPlan | None = None
        self.compiled = False

    def start(self) -> WorkerReport:
        return self._executor.start()

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        self.plan = plan
        future = self._executor.submit(plan)
        self.compiled = future.result().num_compiles > 0
        return future

    def collective(self, method: str, *args: Any) -> list[Any]:
        return self._executor.collective(method, *args)

    def check_alive(self) -> None:
        self._executor.check_alive()

    def processes(self) -> list[Peer]:
        return self._executor.processes()


class _Drive:
    """Runs batches through an engine and writes down its steps."""

    def __init__(self, engine: Engine, recorder: Recorder, clock: Callable[[], float]) -> None:
        self._engine, self._recorder, self._clock = engine, recorder, clock
        self._shaper = Shaper(engine.report.kv_groups)
        self._draw = np.random.default_rng(0)
        self._number = 0
        self.steps: list[MeasuredStep] = []

    def run(self, batch: Batch) -> None:
        most = self._engine.report.max_model_len - batch.output - 1
        for length in batch.prompts:
            self._add(self._prompt(min(self._near(length), most)), batch.output)
        joining = list(map(self._near, batch.joining))
        while self._engine.has_work() or joining:
            self._step(fitted=True)
            begun = not any(share.is_prefill for share in self._plan().scheduled)
            if joining and (begun or not self._engine.has_work()):
                self._add(self._prompt(joining.pop(0)), 1)

    def forget_apart(self) -> None:
        self.steps = [step for step in self.steps if step.fitted]

    def run_apart(self, report: WorkerReport, seed: int) -> None:
        """A workload as clients would send it, some requests at a time."""
        longest = max(1, report.max_model_len // 4)
        load = Workload(
            requests=KEPT_APART,
            rate=None,
            concurrency=8,
            input=Lengths("lognormal", min(128, longest), 0.7),
            output=Lengths("lognormal", min(24, longest), 0.5),
            seed=seed,
        )
        coming = requests(load, report.vocab_size, report.max_model_len)
        left, ended = KEPT_APART, load.concurrency
        while left:
            for _ in range(ended):
                if (asked := next(coming, None)) is not None:
                    self._add(asked.prompt, asked.output)
            ended = self._step(fitted=False)
            left -= ended

    def _near(self, length: int) -> int:
        """A step of a shape that was there before may be faster than others, and a workload's steps
        are of ever new shapes."""
        return int(length * self._draw.uniform(1 - NEAR, 1))

    def _prompt(self, length: int) -> list[int]:
        vocabulary = self._engine.report.vocab_size
        found: list[int] = self._draw.integers(
            min(100, vocabulary // 3), vocabulary, length
        ).tolist()
        return found

    def _add(self, prompt: Sequence[int], output: int) -> None:
        self._number += 1
        self._engine.add(
            EngineRequest(
                request_id=f"measured-{self._number}",
                prompt_token_ids=list(prompt),
                params=SamplingParams(temperature=0, max_tokens=output, ignore_eos=True),
            )
        )

    def _plan(self) -> StepPlan:
        plan = self._recorder.plan
        if plan is None:
            raise VllmDiError("the engine has work, and its scheduler makes no step")
        return plan

    def _step(self, *, fitted: bool) -> int:
        """-> requests that ended."""
        self._recorder.plan = None
        begin = self._clock()
        made = self._engine.step()
        seconds = self._clock() - begin
        plan = self._plan()
        for output in made.outputs:
            if output.error is not None:
                raise VllmDiError(f"a measured request failed: {output.error}")
        if not self._recorder.compiled:  # which tells nothing about the next
            self.steps.append(MeasuredStep(self._shaper.shape(plan), seconds, fitted))
        return sum(output.finish_reason is not None for output in made.outputs)
