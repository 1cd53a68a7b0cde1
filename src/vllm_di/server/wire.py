"""What the API process and the engine process say to each other."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_di.components.messages import EngineOutputs, EngineRequest, WorkerReport
from vllm_di.components.transport import Failure


class Lists(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What may be long in the sampling parameters, and is the same for all texts of a request."""

    logit_bias: dict[int, float] | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    structured_output: dict[str, Any] | None = None
    bad_words_token_ids: list[list[int]] = []


class Keep(msgspec.Struct, tag=True, frozen=True):
    """Keep a prompt or lists under a key, for requests to come."""

    key: int
    prompt: list[int] | None = None
    lists: Lists | None = None


class Drop(msgspec.Struct, tag=True, frozen=True):
    """No request to come will name these keys."""

    keys: list[int]


class Add(msgspec.Struct, tag=True, frozen=True):
    request: EngineRequest
    """Without what is kept."""
    prompt: int = 0
    """Key of its prompt; 0 where the request has it."""
    lists: int = 0
    """Key of its lists; 0 where it has none."""


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


ToEngine = Keep | Drop | Add | Abort | ResetPrefixCache
ToClient = Stage | Ready | Outputs | Failure
