"""A worker's program of platform=spyre, fed batches by hand: one prompt, or decodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.ports.openvino import running as by_hand
from tests.ports.openvino.running import SEQUENCES, Share, tokens

from vllm_di.components.interfaces import Placement
from vllm_di.components.messages import KvGroup
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer

BLOCK, COLUMNS = 64, by_hand.BLOCKS_PER_SEQUENCE
SMALL = (
    *("shapes.prefill_queries=[128,192]", "shapes.columns=[4]", "model.max_model_len=256"),
    "scheduler.max_num_batched_tokens=128",
)

STEPS: list[list[Share]] = [
    [(0, tokens(0, 37))],
    [(3, tokens(2, 97))],  # more than a block
    [(0, tokens(1, 1)), (3, tokens(2, 1))],  # decodes of different lengths, and padding
    [(3, tokens(3, 64))],  # a chunk that begins inside a block
    [(1, tokens(4, 64))],  # a whole block
    [(0, tokens(8, 1)), (1, tokens(9, 1)), (3, tokens(10, 1))],
]


class Padded(by_hand.Padded):
    """In Spyre's blocks."""

    steps, block = STEPS, BLOCK


@contextmanager
def running(*overrides: str) -> Iterator[Padded]:
    """Loaded, its cache full of NaN."""
    fixed = [
        "platform=spyre",
        "device.simulated=true",
        "model.dtype=float32",
        *SMALL,
        "trust=[tests]",
    ]
    with opened(
        WorkerContainer, assemble([*fixed, *overrides]), placement=Placement()
    ) as container:
        groups = [KvGroup([spec.layer for spec in container.worker().load().kv_specs])]
        program = container.program()
        program.prepare(groups)
        program.allocate(groups, SEQUENCES * COLUMNS + 1)
        for cache in program.caches:
            for tensor in cache.tensors:
                tensor.fill_(float("nan"))
        yield Padded(container.model(), program, container.shapes())
