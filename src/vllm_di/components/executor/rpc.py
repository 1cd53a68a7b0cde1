"""What an executor and a worker process say to each other."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_di.components.messages import CacheSize, KvGroup, StepInput, StepResult, WorkerReport
from vllm_di.components.transport import Failure


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A worker's first message: its container is filled."""

    rank: int
    stage: int = 0


class Load(msgspec.Struct, tag=True, frozen=True):
    """Load the weights; answered by Report."""


class Report(msgspec.Struct, tag=True, frozen=True):
    report: WorkerReport


class Prepare(msgspec.Struct, tag=True, frozen=True):
    """Compile, then say how many blocks fit; answered by Size."""

    groups: list[KvGroup]


class Size(msgspec.Struct, tag=True, frozen=True):
    size: CacheSize


class Allocate(msgspec.Struct, tag=True, frozen=True):
    """Allocate the KV cache and warm up; answered by Done."""

    num_blocks: int


class Done(msgspec.Struct, tag=True, frozen=True):
    value: Any = None


class Execute(msgspec.Struct, tag=True, frozen=True):
    """Run a step; answered by Result."""

    step: StepInput


class Result(msgspec.Struct, tag=True, frozen=True):
    result: StepResult


class Close(msgspec.Struct, tag=True, frozen=True):
    """Close the container and exit."""


Command = Load | Prepare | Allocate | Execute | Close
Answer = Hello | Report | Size | Done | Result | Failure
