"""An executor whose steps take virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from vllm_di.components.executor.inline import Done
from vllm_di.components.interfaces import Executor
from vllm_di.components.messages import (
    SampledTokens,
    ScheduledSequence,
    StepPlan,
    StepResult,
    WorkerReport,
)
from vllm_di.errors import ConfigError
from vllm_di.simulation.shapes import Shaper
from vllm_di.simulation.step_times import StepTimeModel

TOKEN = 0
"""What a simulated worker always answers. No request of a simulation ends at a token."""


class Clock:
    """The virtual time of one replica, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now


class Timer:
    """The times of one worker's steps, or of a group of ranks, and which of them are guesses."""

    def __init__(self, model: StepTimeModel, shaper: Shaper, name: str = "") -> None:
        self.model, self._shaper, self.name = model, shaper, name
        self.num_steps = 0
        self.beyond: Counter[str] = Counter()
        """Steps beyond what was measured, by ``StepTimeModel.beyond``."""

    def seconds(self, plan: StepPlan) -> float:
        """Of a plan without drafts."""
        shape = self._shaper.shape(plan)
        self.num_steps += 1
        if (what := self.model.beyond(shape)) is not None:
            self.beyond[what] += 1
        return self.model.seconds(shape)


class SimulatedExecutor(Executor):
    """Stands for an executor and its workers, which take a step at a time. The clock moves on while
    ``submit`` runs, as it does in the engine's own process under ``executor=inline``."""

    def __init__(self, report: WorkerReport, timer: Timer, clock: Clock) -> None:
        self._report, self._timer, self._clock = report, timer, clock
        self.busy = 0.0
        """Seconds of all steps so far."""

    def start(self) -> WorkerReport:
        return self._report

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        seconds = self._timer.seconds(plan)
        self.busy += seconds
        self._clock.now += seconds
        return Done(result_of(plan.step, plan.scheduled))

    def collective(self, method: str, *args: Any) -> list[Any]:
        raise ConfigError(f"a simulated worker answers no call, and {method!r} was made")


def result_of(step: int, shares: Sequence[ScheduledSequence]) -> StepResult:
    """A token for each sequence whose end the step reaches."""
    return StepResult(step, [SampledTokens(s.seq_id, [TOKEN]) for s in shares if s.samples])
