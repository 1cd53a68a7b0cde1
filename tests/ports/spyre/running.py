"""A worker's program of platform=spyre, fed batches by hand: one prompt, or decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tests.ports.openvino.running import Running, Share, tokens
from torch import Tensor

from vllm_di.components.interfaces import BatchPlan, Model, ModelProgram, Placement, ShapePolicy
from vllm_di.components.messages import KvGroup
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer

BLOCK, COLUMNS, SEQUENCES = 64, 4, 5
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


class Padded(Running):
    """Each batch as the shape policy pads it."""

    steps = STEPS

    def __init__(self, model: Model, program: ModelProgram, shapes: ShapePolicy) -> None:
        super().__init__(model, program)
        self.shapes = shapes
        order = torch.randperm(SEQUENCES * COLUMNS, generator=torch.Generator().manual_seed(0))
        self.tables = order.to(torch.int32).view(SEQUENCES, COLUMNS) + 1  # 0 is for padding

    def plan(self, shares: Sequence[Share], hidden: Tensor | None = None) -> BatchPlan:
        """One step; logits of every token."""
        positions, slots = [], []
        for seq, ids in shares:
            start, self.lengths[seq] = self.lengths[seq], self.lengths[seq] + len(ids)
            place = torch.arange(start, self.lengths[seq])
            positions.append(place)
            slots.append(self.tables[seq, place // BLOCK].long() * BLOCK + place % BLOCK)
        queries = [len(ids) for _, ids in shares]
        lengths = [self.lengths[seq] for seq, _ in shares]
        used = -(-max(lengths) // BLOCK)
        return BatchPlan(
            token_ids=torch.tensor([t for _, ids in shares for t in ids]),
            positions=torch.cat(positions),
            query_start=torch.tensor([0, *queries]).cumsum(0).int(),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=self.tables[[seq for seq, _ in shares], :used],
            slot_mapping=torch.cat(slots),
            logits_rows=torch.arange(sum(queries)),
            query_lens_host=queries,
            seq_lens_host=lengths,
            hidden=hidden,
        )

    def feed(self, shares: Sequence[Share], hidden: Tensor | None = None) -> Tensor:
        plan = self.plan(shares)
        total = len(plan.token_ids)
        padded = self.shapes.pad(plan)
        if hidden is not None:
            padded.hidden = hidden.new_zeros(len(padded.token_ids), hidden.shape[1])
            padded.hidden[:total] = hidden
        return self.program.run(padded)[:total]


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
