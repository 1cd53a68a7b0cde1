"""Each replica in turn, whatever it has to do."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_di.components.interfaces import ReplicaLoad, Router
from vllm_di.components.messages import EngineRequest


class RoundRobinRouter(Router):
    """Goes round the numbers of the replicas, past those that take no requests."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, request: EngineRequest, loads: Sequence[ReplicaLoad]) -> int:
        numbers = sorted(load.replica for load in loads)
        self._last = next((n for n in numbers if n > self._last), numbers[0])
        return self._last
