"""A decode step as one call: its kernels are recorded once for each batch shape, then replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Annotated, Any

import msgspec
from torch import Tensor

from vllm_di.components.interfaces import (
    AttentionBackend,
    Communicator,
    GraphPolicy,
    LayerCache,
    Model,
    OpTable,
    Quantization,
    Replay,
)

log = logging.getLogger(__name__)
Count = Annotated[int, msgspec.Meta(ge=1)]


class TapeGraph(GraphPolicy):
    """Replays steps of up to ``max_tokens`` tokens; longer ones have little to gain.

    A step can be replayed when all that computes in it are kernels of one op library: the parts
    must say so (``replayable``), torch is watched while it is recorded, and there is one rank. Any
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
        self._can_replay = attention.can_replay
        self._tapes: dict[Hashable, tuple[Tensor, Replay] | None] = {}
        parts = {
            "attention": attention.replayable,
            "quantization": quantization.replayable,
            "model": model.replayable,
        }
        reasons = [f"{slot} is not replayable" for slot, can in parts.items() if not can]
        if self._recorder is None:
            reasons.append("ops are not all of one library that records")
        if communicator.world_size > 1:
            reasons.append("ranks wait for each other")
        self.reason = "; ".join(reasons)
        """Why nothing is replayed; empty when steps are."""

    def wrap(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        recorder = self._recorder
        if recorder is None or self.reason:
            log.info("steps are not replayed: %s", self.reason)
            return step

        def run(
            token_ids: Tensor,
            positions: Tensor,
            caches: Sequence[LayerCache],
            metadata: Any,
            hidden: Tensor | None = None,
        ) -> Tensor:
            if len(token_ids) > self._max_tokens or not self._can_replay(metadata):
                return step(token_ids, positions, caches, metadata, hidden)
            key = _key(token_ids, positions, metadata, hidden)
            known = self._tapes.get(key, ...)
            if known is None:
                return step(token_ids, positions, caches, metadata, hidden)
            if known is not ...:
                known[1]()
                return known[0]
            if len(self._tapes) >= self._max_tapes:
                self._tapes.clear()
            result, replay, reason = recorder.record(
                lambda: step(token_ids, positions, caches, metadata, hidden)
            )
            if replay is None:
                log.info("a step of %d tokens is not replayed: %s", len(token_ids), reason)
            self._tapes[key] = None if replay is None else (result, replay)
            return result

        return run

    def close(self) -> None:
        self._tapes.clear()


def _key(token_ids: Tensor, positions: Tensor, metadata: Any, hidden: Tensor | None) -> Hashable:
    """What a recording holds on to: where the batch's tensors lie, and how many rows they have."""
    tensors = [token_ids, positions] if hidden is None else [token_ids, positions, hidden]
    tensors += _tensors(metadata)
    return tuple((t.data_ptr(), len(t), t.stride(0)) for t in tensors)


def _tensors(metadata: Any) -> list[Tensor]:
    """Those in its fields; a field may be metadata itself."""
    found: list[Tensor] = []
    for name in getattr(metadata, "__dataclass_fields__", ()):
        value = getattr(metadata, name)
        found += [value] if isinstance(value, Tensor) else _tensors(value)
    return found
