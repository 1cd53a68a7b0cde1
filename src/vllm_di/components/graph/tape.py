"""A decode step as one call: its kernels are recorded once for each batch shape, then replayed."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Annotated, Any

import msgspec
from torch import Tensor

from vllm_di.components.graph.reuse import unable
from vllm_di.components.interfaces import (
    AttentionBackend,
    Communicator,
    GraphPolicy,
    Model,
    ModelStep,
    OpTable,
    Quantization,
    Replay,
    StepFunction,
)

log = logging.getLogger(__name__)
Count = Annotated[int, msgspec.Meta(ge=1)]


class TapeGraph(GraphPolicy):
    """Replays steps of up to ``max_tokens`` tokens; longer ones have little to gain.

    A step can be replayed when all that computes in it are kernels of one op library: the parts
    must say so (``reuses``), torch is watched while it is recorded, and there is one rank. Any
    other runs as it stands, and the log says why.
    """

    def __init__(
        self,
        ops: OpTable,
        attention: AttentionBackend,
        quantization: Quantization,
        communicator: Communicator,
        model: Model,
        *,
        max_tokens: Count,
        max_tapes: Count,
    ) -> None:
        self._recorder = ops.recorder()
        self._max_tokens, self._max_tapes = max_tokens, max_tapes
        self._reuses_step = attention.reuses_step
        self._tapes: dict[Hashable, tuple[Tensor, Replay] | None] = {}
        reasons = unable("record", attention=attention, quantization=quantization, model=model)
        if self._recorder is None:
            reasons.append("ops are not all of one library that records")
        if communicator.world_size > 1:
            reasons.append("ranks wait for each other")
        self.reason = "; ".join(reasons)
        """Why nothing is replayed; empty when steps are."""

    def wrap(self, forward: StepFunction) -> StepFunction:
        recorder = self._recorder
        if recorder is None or self.reason:
            log.info("steps are not replayed: %s", self.reason)
            return forward

        def run(step: ModelStep) -> Tensor:
            if step.token_ids.shape[0] > self._max_tokens or not all(
                "record" in self._reuses_step(metadata) for metadata in step.metadata
            ):
                return forward(step)
            key = _key(step)
            known = self._tapes.get(key, ...)
            if known is None:
                return forward(step)
            if known is not ...:
                known[1]()
                return known[0]
            if len(self._tapes) >= self._max_tapes:
                self._tapes.clear()
            result, replay, reason = recorder.record(lambda: forward(step))
            if replay is None:
                log.info("a step of %d tokens is not replayed: %s", len(step.token_ids), reason)
            self._tapes[key] = None if replay is None else (result, replay)
            return result

        return run

    def close(self) -> None:
        self._tapes.clear()


def _key(step: ModelStep) -> Hashable:
    """The cache key: address, rows and stride of each tensor of the batch."""
    tensors = [step.token_ids, step.positions]
    if step.hidden is not None:
        tensors.append(step.hidden)
    for metadata in step.metadata:
        tensors += _tensors(metadata)
    return tuple((t.data_ptr(), t.shape[0], t.stride(0)) for t in tensors)


def _tensors(metadata: Any) -> list[Tensor]:
    """The tensors in its fields, also in fields that are metadata themselves."""
    found: list[Tensor] = []
    for name in getattr(metadata, "__dataclass_fields__", ()):
        value = getattr(metadata, name)
        found += [value] if isinstance(value, Tensor) else _tensors(value)
    return found
