"""A plan is built from scratch by a plain rule and compared, whatever the steps before it were."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import BatchPlan, GroupTables, PlanShape
from vllm_di.components.messages import (
    KvGroup,
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    StepPlan,
)
from vllm_di.components.model_runner.batch import Batch

SIZE, MAX_LEN, MAX_SEQS = 4, 120, 6
GROUPS = [KvGroup([0]), KvGroup([1], 9)]


class CopyingDevice(HostDevice):
    """Has memory of its own, as an accelerator does."""

    on_host = False

    def __init__(self) -> None:
        super().__init__(threads=1, memory_budget=None, default_dtype="float32")


class Scheduler:
    """Makes plans of known sequences: prompts in chunks, decodes, blocks ahead, ends."""

    def __init__(self, seed: int, on_host: bool) -> None:
        self.random = random.Random(seed)
        device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
        self.batch = Batch(
            max_num_seqs=MAX_SEQS,
            max_num_tokens=64,
            max_model_len=MAX_LEN,
            block_size=SIZE,
            groups=GROUPS,
            device=device if on_host else CopyingDevice(),
        )
        self.tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[list[int]]] = {}
        self.computed: dict[int, int] = {}
        self.finished: list[int] = []
        self.new: list[NewSequence] = []
        self.step = 0

    def start(self, length: int) -> None:
        self.step += 1
        seq_id = 1000 + self.step + len(self.tokens)
        ids = [self.random.randrange(50) for _ in range(length)]
        self.tokens[seq_id], self.computed[seq_id] = ids, 0
        self.blocks[seq_id] = [[] for _ in GROUPS]
        self.new.append(
            NewSequence(
                seq_id=seq_id, params=SamplingParams(), token_ids=list(ids), prompt_len=length
            )
        )

    def end(self, seq_id: int) -> None:
        del self.tokens[seq_id], self.computed[seq_id], self.blocks[seq_id]
        self.finished.append(seq_id)

    def run(self, seq_ids: list[int], chunk: int) -> BatchPlan:
        """One step of these, checked against the rule."""
        shares, spans = [], []
        for seq_id in seq_ids:
            known, done = self.tokens[seq_id], self.computed[seq_id]
            chosen = []
            if done == len(known):
                chosen = [self.random.randrange(3)]  # often the same again
                known += chosen
            count = min(chunk, len(known) - done)
            fresh = []
            for held in self.blocks[seq_id]:
                ahead = self.random.choice([0, 0, 0, 2])
                wanted = min(-(-(done + count) // SIZE) + ahead, MAX_LEN // SIZE)
                fresh.append([self.random.randrange(900) for _ in range(wanted - len(held))])
                held += fresh[-1]
            spans.append((seq_id, done, done + count))
            shares.append(
                ScheduledSequence(seq_id, done, count, fresh, chosen, True, len(known) - done > 1)
            )
            self.computed[seq_id] = done + count
        self.step += 1
        plan = StepPlan(self.step, self.new, shares, self.finished)
        self.new, self.finished = [], []
        self.batch.update(plan)
        total = sum(share.num_tokens for share in shares)
        rows = [0, total - 1] if self.random.random() < 0.5 else [total - 1]
        built = self.batch.build(shares, rows)
        self.check(built, spans, rows)
        return built

    def check(self, built: BatchPlan, spans: list[tuple[int, int, int]], rows: list[int]) -> None:
        assert built.token_ids.tolist() == [
            t for s, start, end in spans for t in self.tokens[s][start:end]
        ]
        positions = [at for _, start, end in spans for at in range(start, end)]
        assert built.positions.tolist() == positions
        assert built.query_lens_host == [end - start for _, start, end in spans]
        starts = built.query_start.tolist()
        assert starts == [sum(built.query_lens_host[:i]) for i in range(len(spans) + 1)]
        assert built.logits_rows.tolist() == rows
        groups: list[BatchPlan | GroupTables] = [built, *built.more_groups]
        for index, tables in enumerate(groups):
            slots = [
                self.blocks[s][index][at // SIZE] * SIZE + at % SIZE
                for s, start, end in spans
                for at in range(start, end)
            ]
            assert tables.slot_mapping.tolist() == slots
            assert tables.seq_lens.tolist() == tables.seq_lens_host
            # a window's table is cut once a sequence of the step is as long as it
            cuts = any(GROUPS[index].first_block(start, SIZE) for _, start, _ in spans)
            for row, (s, start, end) in enumerate(spans):
                first = GROUPS[index].first_block(start, SIZE) if cuts else 0
                length = end - first * SIZE
                assert tables.seq_lens_host[row] == length
                seen = -(-length // SIZE)
                held = self.blocks[s][index][first : first + seen]
                assert tables.block_table[row].tolist()[:seen] == held


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_a_plan_does_not_depend_on_the_steps_before(seed: int, on_host: bool) -> None:
    scheduler = Scheduler(seed, on_host)
    choose = scheduler.random
    for _ in range(120):
        if choose.random() < 0.02:
            scheduler.batch.blank(PlanShape(8, 2, 2, 3, 5))
        if choose.random() < 0.02:
            scheduler.batch.blank(PlanShape(MAX_SEQS, MAX_SEQS, MAX_SEQS, 1, 1))
        live = list(scheduler.tokens)
        for seq_id in live:
            if len(scheduler.tokens[seq_id]) > MAX_LEN - 3 or choose.random() < 0.03:
                scheduler.end(seq_id)
        while not scheduler.tokens or (len(scheduler.tokens) < MAX_SEQS and choose.random() < 0.1):
            scheduler.start(choose.choice([1, 1, 5, 30]))
        live = list(scheduler.tokens)
        if choose.random() < 0.2:
            live = choose.sample(live, choose.randint(1, len(live)))
        scheduler.run(live, choose.choice([1, 1, 1, 7]))


def test_a_steady_decode_copies_what_changed_and_makes_no_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = Scheduler(0, on_host=False)
    for _ in range(3):
        scheduler.start(1)
    live = list(scheduler.tokens)
    for _ in range(5):
        scheduler.run(live, 1)
    copies, copy = [], Tensor.copy_

    def counted(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copies.append(self.shape)
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "copy_", counted)
    views = []
    for _ in range(SIZE):
        plan = scheduler.run(live, 1)
        views.append((plan.query_start, plan.seq_lens, plan.token_ids, plan.positions))
    # tokens, positions; in each group lengths and slots, and the table where blocks came
    assert len(copies) <= SIZE * (2 + 3 * len(GROUPS))
    assert all(a is b for some in views for a, b in zip(some, views[0], strict=True))
    assert torch.equal(plan.query_start, torch.arange(4, dtype=torch.int32))


@pytest.mark.parametrize("on_host", [True, False])
def test_types_of_tokens(on_host: bool) -> None:
    """Those of each pair; 0 for a prompt that is none, and in a warm-up."""
    device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
    batch = Batch(
        max_num_seqs=3,
        max_num_tokens=16,
        max_model_len=MAX_LEN,
        block_size=SIZE,
        groups=GROUPS[:1],
        device=device if on_host else CopyingDevice(),
        has_types=True,
    )
    types = [[0, 0, 1], [], [0, 1, 1, 1]]
    new = [
        NewSequence(
            seq_id=i,
            params=SamplingParams(),
            token_ids=[7] * (len(one) or 2),
            prompt_len=len(one) or 2,
            token_type_ids=one,
        )
        for i, one in enumerate(types)
    ]
    for step, chunk in enumerate((new, new[1:])):
        shares = [
            ScheduledSequence(n.seq_id, 0, n.prompt_len, [[n.seq_id + 1]], [], True, True)
            for n in chunk
        ]
        plan = StepPlan(step, [] if step else new, shares, [0] if step else [])
        batch.update(plan)
        built = batch.build(shares, [0])
        assert built.token_types is not None
        wanted = [t for n in chunk for t in n.token_type_ids or [0, 0]]
        assert built.token_types.tolist() == wanted
    blank = batch.blank(PlanShape(tokens=5, rows=1, seqs=1, columns=2, queries=5))
    assert blank.token_types is not None
    assert blank.token_types.tolist() == [0] * 5
