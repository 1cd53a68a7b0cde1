"""A worker's program, fed batches by hand: several sequences, chunks, blocks out of order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vllm_di.components.interfaces import BatchPlan, Model, ModelProgram, Placement, ShapePolicy
from vllm_di.components.messages import KvGroup
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer

BLOCK = 32
BLOCKS_PER_SEQUENCE = 4
SEQUENCES = 5

Share = tuple[int, Sequence[int]]
"""A sequence and the tokens that it brings to a step."""


class Running:
    """A program with a cache of its own. Token ids are remembered by their number alone."""

    block = BLOCK

    def __init__(self, model: Model, program: ModelProgram) -> None:
        self.model, self.program, self.caches = model, program, program.caches
        order = torch.randperm(
            SEQUENCES * BLOCKS_PER_SEQUENCE, generator=torch.Generator().manual_seed(0)
        )
        self.tables = order.to(torch.int32).view(SEQUENCES, BLOCKS_PER_SEQUENCE)
        self.lengths = [0] * SEQUENCES

    def plan(self, shares: Sequence[Share], hidden: Tensor | None = None) -> BatchPlan:
        """One step; logits of every token."""
        positions, slots = [], []
        for seq, ids in shares:
            start, self.lengths[seq] = self.lengths[seq], self.lengths[seq] + len(ids)
            place = torch.arange(start, self.lengths[seq])
            positions.append(place)
            slots.append(
                self.tables[seq, place // self.block].long() * self.block + place % self.block
            )
        queries = [len(ids) for _, ids in shares]
        lengths = [self.lengths[seq] for seq, _ in shares]
        return BatchPlan(
            token_ids=torch.tensor([t for _, ids in shares for t in ids]),
            positions=torch.cat(positions),
            query_start=torch.tensor([0, *queries]).cumsum(0).int(),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=self.tables[[seq for seq, _ in shares]],
            slot_mapping=torch.cat(slots),
            logits_rows=torch.arange(sum(queries)),
            query_lens_host=queries,
            seq_lens_host=lengths,
            hidden=hidden,
        )

    def feed(self, shares: Sequence[Share], hidden: Tensor | None = None) -> Tensor:
        """-> logits [tokens, vocab], or what a stage that is not the last gives."""
        return self.program.run(self.plan(shares, hidden))


class Padded(Running):
    """Each batch as the shape policy pads it; block 0 is kept free for padding."""

    def __init__(self, model: Model, program: ModelProgram, shapes: ShapePolicy) -> None:
        super().__init__(model, program)
        self.shapes = shapes
        self.tables += 1

    def feed(self, shares: Sequence[Share], hidden: Tensor | None = None) -> Tensor:
        plan = self.plan(shares)
        total = len(plan.token_ids)
        padded = self.shapes.pad(plan)
        if hidden is not None:
            padded.hidden = hidden.new_zeros(len(padded.token_ids), hidden.shape[1])
            padded.hidden[:total] = hidden
        return self.program.run(padded)[:total]


@contextmanager
def running(*overrides: str) -> Iterator[Running]:
    """Loaded and compiled, its cache filled with what nobody wrote."""
    with opened(WorkerContainer, assemble(overrides), placement=Placement()) as container:
        worker = container.worker()
        groups = [KvGroup([spec.layer for spec in worker.load().kv_specs])]
        model, program = container.model(), container.program()
        program.prepare(groups)
        program.allocate(groups, SEQUENCES * BLOCKS_PER_SEQUENCE)
        for cache in program.caches:
            for tensor in (cache.key, cache.value):
                tensor.fill_(float("nan") if tensor.is_floating_point() else 255)
        yield Running(model, program)


def tokens(seed: int, count: int, vocab: int = 97) -> list[int]:
    return [(seed * 31 + 7 * i * i + 3 * i) % vocab + 1 for i in range(count)]


STEPS: list[list[Share]] = [
    [(0, tokens(0, 37))],  # a prompt
    [(0, tokens(1, 1)), (3, tokens(2, 5)), (1, tokens(3, 33))],  # a decode among prompts
    [(1, tokens(4, 9)), (3, tokens(5, 1)), (0, tokens(6, 1)), (4, tokens(7, 64))],  # chunks
    [(0, tokens(8, 1)), (1, tokens(9, 1)), (3, tokens(10, 1)), (4, tokens(11, 1))],  # decodes
    [(4, tokens(12, 31)), (2, tokens(13, 1))],
]
