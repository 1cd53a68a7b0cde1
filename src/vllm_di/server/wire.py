"""The messages between the API process and the engine process."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_di.components.messages import EngineOutputs, EngineRequest, WorkerReport
from vllm_di.components.transport import Failure

REPLACEMENT = "replacement"
"""An engine process's first argument, where it takes the place of an engine that was ready."""


class Lists(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters that may be long; all choices of a request share them."""

    logit_bias: dict[int, float] | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    structured_output: dict[str, Any] | None = None
    bad_words_token_ids: list[list[int]] = []


class Keep(msgspec.Struct, tag=True, frozen=True):
    """Store a prompt or lists under a key, for the requests that follow."""

    key: int
    prompt: list[int] | None = None
    lists: Lists | None = None


class Drop(msgspec.Struct, tag=True, frozen=True):
    """Forget these keys: no later request uses them."""

    keys: list[int]


class Add(msgspec.Struct, tag=True, frozen=True):
    request: EngineRequest
    """Without what was sent as ``Keep``."""
    prompt: int = 0
    """Key of its prompt; 0: the request contains it."""
    lists: int = 0
    """Key of its lists; 0: it has none."""


class Abort(msgspec.Struct, tag=True, frozen=True):
    request_id: str


class ResetPrefixCache(msgspec.Struct, tag=True, frozen=True):
    """Drop the cached blocks that no sequence uses."""


class Stage(msgspec.Struct, tag=True, frozen=True):
    """What the starting engine does at the moment."""

    name: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    report: WorkerReport
    patience: float | None = None
    """Seconds after which a step counts as hung; None: never."""


class Outputs(msgspec.Struct, tag=True, frozen=True):
    outputs: EngineOutputs


ToEngine = Keep | Drop | Add | Abort | ResetPrefixCache
ToClient = Stage | Ready | Outputs | Failure
