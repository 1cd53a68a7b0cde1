"""From the rows of a step to the vectors of the prompts whose end it reached."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import Model, Pooler, SequenceState
from vllm_di.components.messages import PooledVector, Pooling
from vllm_di.errors import ConfigError

log = logging.getLogger(__name__)


class Pooled(NamedTuple):
    """What a pooler reads of one sequence in one step."""

    state: SequenceState
    rows: slice
    """Of the rows that the program gives."""
    ends: bool
    """Whether the step runs the prompt's last token."""


def pooling_of(model: Model, pooler: Pooler) -> Pooling:
    """What prompts become; from here on the model gives hidden states. Raises ConfigError."""
    pooling = pooler.report(model.give_hidden())
    if pooling.kind != model.pools_to:
        what = (
            "is a cross-encoder, whose head scores pairs of texts"
            if model.pools_to == "score"
            else "has no head that scores pairs of texts"
        )
        raise ConfigError(
            f"{type(model).__name__} {what}: {type(pooler).__name__} does not suit it; take "
            f"pooler={poolers_for(model)}",
            key="pooler",
        )
    pooling = msgspec.structs.replace(pooling, token_types=model.token_types)
    if model.causal:
        return pooling
    return msgspec.structs.replace(pooling, every_token=True, whole_prompts=True)


def poolers_for(model: Model) -> str:
    """The options of the group ``pooler`` that suit a model."""
    return "score" if model.pools_to == "score" else "mean, cls or last"


def pool(
    pooler: Pooler, shares: Sequence[Pooled], rows: Tensor
) -> tuple[list[PooledVector], dict[int, str]]:
    """rows [wanted, width] fp32 -> the vectors of the prompts that end, and seq_id -> reason for
    those that cannot have one."""
    vectors: list[PooledVector] = []
    failed: dict[int, str] = {}
    for share in shares:
        seq_id = share.state.seq_id
        try:
            pooler.take(rows[share.rows], share.state)
            if not share.ends:
                continue
            vector = pooler.finish(share.state).to("cpu", torch.float32)
        except Exception as error:  # a pooler of somebody else's: the request ends, not the engine
            log.exception("pooling failed")
            failed[seq_id] = f"pooling failed: {type(error).__name__}: {error}"
            continue
        if bool(vector.isfinite().all()):
            vectors.append(PooledVector(seq_id, little_endian(vector)))
        else:
            failed[seq_id] = "the model gave a vector that is not finite"
    return vectors, failed


def little_endian(vector: Tensor) -> bytes:
    """fp32 on the host, as ``PooledVector.data``."""
    array = vector.contiguous().numpy()
    return (array if sys.byteorder == "little" else array.byteswap()).tobytes()
