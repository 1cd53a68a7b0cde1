"""What the API process and the engine process say to each other."""

from __future__ import annotations

import msgspec

from vllm_di.components.messages import EngineOutputs, EngineRequest, WorkerReport
from vllm_di.components.transport import Failure


class Add(msgspec.Struct, tag=True, frozen=True):
    request: EngineRequest


class Abort(msgspec.Struct, tag=True, frozen=True):
    request_id: str


class ResetPrefixCache(msgspec.Struct, tag=True, frozen=True):
    """Forget cached blocks that nobody holds."""


class Stage(msgspec.Struct, tag=True, frozen=True):
    """What a starting engine is doing."""

    name: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    report: WorkerReport
    patience: float | None = None
    """Seconds after which a step counts as hung; None: never."""


class Outputs(msgspec.Struct, tag=True, frozen=True):
    outputs: EngineOutputs


ToEngine = Add | Abort | ResetPrefixCache
ToClient = Stage | Ready | Outputs | Failure
