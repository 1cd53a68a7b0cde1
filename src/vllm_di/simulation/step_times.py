"""The steps of a platform, as they were measured: a file, and the time of any other step by it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from vllm_di.components.messages import WorkerReport
from vllm_di.errors import ConfigError, one_line
from vllm_di.simulation.curve import Curve
from vllm_di.simulation.shapes import StepShape

LEAST = 8
"""Measured steps of a kind, without which there is no fit."""


class MeasuredStep(msgspec.Struct, frozen=True, array_like=True):
    shape: StepShape
    seconds: float
    """Of the engine's whole step: schedule, run, take the result."""
    fitted: bool
    """False: kept apart, to see how far the fit is off."""


class FitError(msgspec.Struct, frozen=True):
    """How far the fit is from steps that it did not see, as shares of their time."""

    num_steps: int
    median: float
    p90: float
    total: float
    """Of the sum of all: below 0 where the fit says less."""


class StepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """What ``vllm-di simulate measure`` writes."""

    format: Literal[1] = 1
    machine: str
    date: str
    """Of the measurement, ISO."""
    version: str
    """Of this project."""
    platform: str
    model: str
    ranks: int
    """Of the executor that ran the steps."""
    worker: dict[str, dict[str, Any]]
    """Slot to node: what the worker was made of."""
    report: WorkerReport
    steps: list[MeasuredStep]

    def write(self, path: Path) -> None:
        """Raises ConfigError where it cannot."""
        text = msgspec.json.format(msgspec.json.encode(self), indent=0)
        try:
            path.write_bytes(text + b"\n")
        except OSError as error:
            raise ConfigError(
                f"{path}: the step times cannot be written: {one_line(error)}"
            ) from None

    @staticmethod
    def read(path: Path) -> StepTimes:
        """Raises ConfigError that names the file."""
        try:
            found = msgspec.json.decode(path.read_bytes(), type=StepTimes)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(
                f"{path}: no file of step times: {one_line(error)}; `vllm-di simulate measure -o "
                "FILE` writes one"
            ) from None
        if reason := found.lacking():
            raise ConfigError(f"{path}: {reason}")
        return found

    def lacking(self) -> str:
        """Why no time can be told by these steps; nothing where it can."""
        for name, steps in (
            ("decodes", self._of(prompts=False)),
            ("prompts", self._of(prompts=True)),
        ):
            if len(list(steps)) < LEAST:
                return f"fewer than {LEAST} steps with {name} were measured"
        if any(step.seconds <= 0 for step in self.steps):
            return "a step took no time"
        return ""

    def _of(self, *, prompts: bool) -> Iterator[MeasuredStep]:
        return (s for s in self.steps if s.fitted and (s.shape.prompt_tokens > 0) is prompts)

    def model_of_time(self) -> StepTimeModel:
        """The fit."""
        return StepTimeModel(list(self._of(prompts=False)), list(self._of(prompts=True)))

    def error(self) -> FitError | None:
        """Of the steps that were kept apart; None where none were."""
        model = self.model_of_time()
        apart = [
            (step.seconds, model.seconds(step.shape)) for step in self.steps if not step.fitted
        ]
        if not apart:
            return None
        errors = sorted(abs(told / seconds - 1) for seconds, told in apart)
        total = sum(told for _, told in apart) / sum(seconds for seconds, _ in apart) - 1
        return FitError(
            len(errors), statistics.median(errors), errors[len(errors) * 9 // 10], total
        )


class StepTimeModel:
    """Seconds of any step, and which steps lie beyond what was measured."""

    def __init__(self, decodes: Sequence[MeasuredStep], prompts: Sequence[MeasuredStep]) -> None:
        """Of at least one step without prompts and one with."""
        self._decodes = Curve(
            [step.shape.decodes for step in decodes],
            [[step.shape.context] for step in decodes],
            [step.seconds for step in decodes],
        )
        self._prompts = Curve(
            [step.shape.rows for step in prompts],
            [_others(step.shape) for step in prompts],
            [step.seconds for step in prompts],
        )
        every = [*decodes, *prompts]
        self.most_decodes = max(step.shape.decodes for step in every)
        self.most_rows = max(step.shape.rows for step in prompts)
        self.most_context = max(
            step.shape.context / step.shape.decodes for step in every if step.shape.decodes
        )
        """Keys that a decode sees, of a step's mean."""
        self.most_keys = max(step.shape.pairs / step.shape.prompt_tokens for step in prompts)
        """That a prompt token sees, of a step's mean."""

    def seconds(self, shape: StepShape) -> float:
        if not shape.prompt_tokens:
            return self._decodes.seconds(shape.decodes, (shape.context,))
        return self._prompts.seconds(shape.rows, _others(shape))

    def beyond(self, shape: StepShape) -> str | None:
        """Which quantity of the step is larger than any that was measured; None for none."""
        if shape.decodes > self.most_decodes:
            return "decodes"
        if shape.context > self.most_context * shape.decodes:
            return "context"
        if shape.prompt_tokens:
            if shape.rows > self.most_rows:
                return "tokens"
            if shape.pairs > self.most_keys * shape.prompt_tokens:
                return "keys"
        return None

    def measured(self, what: str) -> str:
        """Up to where a quantity of ``beyond`` was measured, for people."""
        return {
            "decodes": f"{self.most_decodes} decodes in a step",
            "context": f"decodes behind {self.most_context:.0f} tokens",
            "tokens": f"{self.most_rows} tokens in a step with prompts",
            "keys": f"prompt tokens that see {self.most_keys:.0f} tokens",
        }[what]


def _others(shape: StepShape) -> tuple[float, ...]:
    return (shape.pairs, shape.context, shape.decodes, shape.prompts)
