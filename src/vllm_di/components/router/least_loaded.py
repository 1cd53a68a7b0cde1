"""The replica with the least to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vllm_di.components.interfaces import ReplicaLoad, Router
from vllm_di.components.messages import EngineRequest

LoadKind = Literal["requests", "tokens"]


class LeastLoadedRouter(Router):
    """By requests or tokens, then by the other of them, then by number."""

    def __init__(self, *, load: LoadKind = "requests") -> None:
        self._load: LoadKind = load

    def choose(self, request: EngineRequest, loads: Sequence[ReplicaLoad]) -> int:
        return least_loaded(loads, self._load)


def least_loaded(loads: Sequence[ReplicaLoad], kind: LoadKind) -> int:
    """Its number. ``loads`` is not empty."""
    if kind == "tokens":
        return min(loads, key=lambda load: (load.num_tokens, load.num_requests)).replica
    return min(loads, key=lambda load: (load.num_requests, load.num_tokens)).replica
