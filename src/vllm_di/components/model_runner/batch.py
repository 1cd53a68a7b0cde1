"""The live sequences of a rank, and the buffers in which each step's batch is built."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from struct import pack_into

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_di.components.interfaces import BatchPlan, Device, GroupTables, PlanShape, SequenceState
from vllm_di.components.messages import KvGroup, NewSequence, ScheduledSequence, StepPlan

COLUMNS_AHEAD = 16
"""Blocks of a sequence that are copied into a step's table before the step needs them: so many
blocks later the table has to be copied again."""


class Batch:
    """Keeps sequences between steps and turns a StepPlan into a BatchPlan.

    All arrays are allocated once and reused: Python and numpy write them, torch sees the same
    memory. On a device each has a twin, to which it is copied without waiting. A plan is good until
    the next one is built; what the next one has in common with it is neither written nor copied
    again.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
        block_size: int,
        groups: Sequence[KvGroup],
        device: Device,
        has_types: bool = False,
    ) -> None:
        """``has_types``: the model has ``token_types``."""
        self.sequences: dict[int, SequenceState] = {}
        self.states: list[SequenceState] = []
        """Those of the step, in its order."""
        self._step_rows: list[int] = []
        self._row_of: dict[int, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._block_size, self._mark = block_size, device.mark
        self._copied: Callable[[], None] = device.mark()
        """Returns when the last plan's arrays have been copied and may be written again."""
        self._tokens = _Buffer((max_num_tokens,), torch.int64, device)
        self._positions = _Buffer((max_num_tokens,), torch.int64, device)
        self._rows = _Buffer((max_num_tokens,), torch.int64, device)
        self._starts = _Buffer((max_num_seqs + 1,), torch.int32, device)
        self._types = _Buffer((max_num_tokens,), torch.int64, device) if has_types else None
        columns = -(-max_model_len // block_size)
        self._groups = [
            Tables(index, group, max_num_seqs, max_num_tokens, columns, block_size, device)
            for index, group in enumerate(groups)
        ]
        self._arange = np.arange(max_num_tokens, dtype=np.int64)

    def update(self, plan: StepPlan) -> None:
        """Forget what ended, take in what is new, append sampled tokens and fresh blocks."""
        for seq_id in plan.finished:
            if self.sequences.pop(seq_id, None) is not None:
                self._free_rows.append(self._row_of.pop(seq_id))
        for new in plan.new:
            self.sequences[new.seq_id] = _state(new, len(self._groups))
            self._row_of[new.seq_id] = self._free_rows.pop()
        if plan.new:  # a row may belong to another sequence now
            for tables in self._groups:
                tables.forget_step()
        self.states, self._step_rows = [], []
        for share in plan.scheduled:
            state, row = self.sequences[share.seq_id], self._row_of[share.seq_id]
            self.states.append(state)
            self._step_rows.append(row)
            state.token_ids += share.new_tokens
            if any(share.new_blocks):
                for tables, held, fresh in zip(
                    self._groups, state.block_ids, share.new_blocks, strict=True
                ):
                    tables.append(row, len(held), fresh)
                    held += fresh

    def build(self, scheduled: Sequence[ScheduledSequence], logits_rows: list[int]) -> BatchPlan:
        """The batch of the step that ``update`` was given."""
        queries = [s.num_tokens for s in scheduled]
        firsts = [s.num_computed for s in scheduled]
        total = sum(queries)
        self._copied()
        if total == len(scheduled):
            self._place_singles(firsts)
        else:
            self._place_chunks(scheduled, queries, firsts)
        if self._types is not None:
            self._place_types(self._types, scheduled)
        self._rows.write(logits_rows)
        rows, states = self._step_rows, self.states
        if total == len(scheduled):
            tables = [g.place_singles(rows, states, firsts) for g in self._groups]
        else:
            positions = self._positions.array[:total]
            tables = [g.place(rows, queries, firsts, positions) for g in self._groups]
        return self._plan(total, len(logits_rows), queries, tables)

    def blank(self, shape: PlanShape) -> BatchPlan:
        """A batch of this shape that touches no slot of the cache, for warm-up. Raises ValueError
        where no sequences make it up."""
        queries, left = [1] * shape.seqs, shape.tokens - shape.seqs
        for row in range(shape.seqs):
            more = min(left, shape.queries - 1)
            queries[row], left = 1 + more, left - more
        if left or queries[0] != shape.queries:
            raise ValueError(f"no sequences make up {shape}")
        filled = (shape.columns - 1) * self._block_size + 1
        lengths = [max(query, filled) for query in queries]
        self._copied()
        self._tokens.array[: shape.tokens] = 0
        if self._types is not None:
            self._types.array[: shape.tokens] = 0
        starts = list(itertools.accumulate(queries, initial=0))
        self._starts.write(starts)
        shifts = np.array(lengths, np.int64) - starts[1:]
        positions = self._positions.array[: shape.tokens]
        np.add(self._arange[: shape.tokens], np.repeat(shifts, queries), out=positions)
        ends = [start - 1 for start in starts[1:]]
        self._rows.write(ends if shape.rows <= shape.seqs else list(range(shape.rows)))
        tables = [group.blank(lengths, shape.tokens) for group in self._groups]
        return self._plan(shape.tokens, shape.rows, queries, tables)

    def _place_singles(self, firsts: list[int]) -> None:
        """One token each: tokens, positions and starts. Python's numbers are faster than arrays of
        a few."""
        self._tokens.write(
            [state.token_ids[first] for state, first in zip(self.states, firsts, strict=True)]
        )
        self._positions.write(firsts)
        self._starts.write(list(range(len(firsts) + 1)))

    def _place_chunks(
        self,
        scheduled: Sequence[ScheduledSequence],
        queries: Sequence[int],
        firsts: Sequence[int],
    ) -> None:
        """Any number of tokens each."""
        start = 0
        for share, state in zip(scheduled, self.states, strict=True):
            first, end = share.num_computed, start + share.num_tokens
            ids = state.token_ids[first : first + share.num_tokens]
            self._tokens.array[start : start + len(ids)] = ids
            self._tokens.array[start + len(ids) : end] = share.draft_tokens
            start = end
        starts = list(itertools.accumulate(queries, initial=0))
        self._starts.write(starts)
        shifts = np.array(firsts, np.int64) - starts[:-1]
        np.add(self._arange[:start], np.repeat(shifts, queries), out=self._positions.array[:start])

    def _place_types(self, types: _Buffer, scheduled: Sequence[ScheduledSequence]) -> None:
        """Of each token the text that it belongs to; 0 where a prompt is no pair."""
        array, start = types.array, 0
        for share, state in zip(scheduled, self.states, strict=True):
            first, end = share.num_computed, start + share.num_tokens
            array[start:end] = state.token_type_ids[first : first + share.num_tokens] or 0
            start = end

    def _plan(
        self, num_tokens: int, num_rows: int, queries: list[int], tables: list[GroupTables]
    ) -> BatchPlan:
        count, first = len(queries), tables[0]
        plan = BatchPlan(
            token_ids=self._tokens.tensor(num_tokens),
            positions=self._positions.tensor(num_tokens),
            query_start=self._starts.tensor(count + 1),
            seq_lens=first.seq_lens,
            block_table=first.block_table,
            slot_mapping=first.slot_mapping,
            logits_rows=self._rows.tensor(num_rows),
            query_lens_host=queries,
            seq_lens_host=first.seq_lens_host,
            more_groups=tables[1:],
            token_types=None if self._types is None else self._types.tensor(num_tokens),
        )
        self._copied = self._mark()
        return plan


class Tables:
    """One KvGroup's block tables, and the buffers of a step's lengths, tables and slots."""

    def __init__(
        self,
        index: int,
        group: KvGroup,
        max_num_seqs: int,
        max_num_tokens: int,
        columns: int,
        block_size: int,
        device: Device,
    ) -> None:
        self._index, self._group, self._block_size = index, group, block_size
        self._tables = np.zeros((max_num_seqs, columns), np.int32)
        """[rows of sequences, blocks since their first token]"""
        self._fresh: list[tuple[int, int, Sequence[int]]] = []
        """Blocks (row, start, blocks) that came since the last step was placed."""
        self._placed: list[int] = []
        """The rows whose tables the step's table holds, one behind the other; empty for none."""
        self._columns_placed = 0
        self._lengths = _Buffer((max_num_seqs,), torch.int32, device)
        self._table = _Buffer((max_num_seqs, columns), torch.int32, device)
        self._slots = _Buffer((max_num_tokens,), torch.int64, device)

    def append(self, row: int, start: int, blocks: Sequence[int]) -> None:
        """Blocks ``start`` and on of the sequence in ``row``."""
        if blocks:
            self._tables[row, start : start + len(blocks)] = blocks
            self._fresh.append((row, start, blocks))

    def forget_step(self) -> None:
        """The step before has nothing in common with the next one."""
        self._placed = []

    def place(
        self,
        rows: list[int],
        queries: Sequence[int],
        firsts: Sequence[int],
        positions: npt.NDArray[np.integer],
    ) -> GroupTables:
        """The tables of a step: of each sequence its row here, its number of queries, the position
        of the first; positions [tokens]."""
        total, slots = len(positions), self._slots.array
        blocks, offsets = np.divmod(positions, self._block_size)
        owners = np.repeat(rows, queries)  # the row of each token's sequence
        held = self._tables[owners, blocks].astype(np.int64)
        slots[:total] = held * self._block_size + offsets
        lengths = [first + number for first, number in zip(firsts, queries, strict=True)]
        return self._place_tables(rows, firsts, lengths, total)

    def place_singles(
        self, rows: list[int], states: Sequence[SequenceState], firsts: Sequence[int]
    ) -> GroupTables:
        """As above, of sequences with one token each."""
        size, group = self._block_size, self._index
        self._slots.write(
            [
                state.block_ids[group][first // size] * size + first % size
                for state, first in zip(states, firsts, strict=True)
            ]
        )
        return self._place_tables(rows, firsts, [first + 1 for first in firsts], len(rows))

    def _place_tables(
        self, rows: list[int], firsts: Sequence[int], lengths: list[int], total: int
    ) -> GroupTables:
        if self._group.window is not None and max(firsts) >= self._group.window:
            return self._cut_off(rows, firsts, lengths, total)
        columns = -(-max(lengths) // self._block_size)
        if rows == self._placed and columns <= self._columns_placed:
            self._add_fresh(rows)
        else:
            self._copy_tables(rows, columns)
        return self._filled(lengths, columns, total)

    def _add_fresh(self, rows: list[int]) -> None:
        """The sequences of the step before: only their new blocks are to be written."""
        for row, start, blocks in self._fresh:
            if row in rows:
                self._table.array[rows.index(row), start : start + len(blocks)] = blocks
        self._fresh.clear()

    def _copy_tables(self, rows: list[int], columns: int) -> None:
        ahead = min(columns + COLUMNS_AHEAD, self._tables.shape[1])
        self._table.array[: len(rows), :ahead] = self._tables[rows, :ahead]
        self._placed, self._columns_placed = rows, ahead
        self._fresh.clear()

    def _cut_off(
        self, rows: Sequence[int], firsts: Sequence[int], lengths: list[int], total: int
    ) -> GroupTables:
        """As above, without the blocks that the window has left."""
        size = self._block_size
        self._placed = []
        self._fresh.clear()
        skipped = [self._group.first_block(position, size) for position in firsts]
        lengths = [n - skip * size for n, skip in zip(lengths, skipped, strict=True)]
        columns = -(-max(lengths) // size)
        # a shorter sequence's columns may run beyond the table: nobody reads them
        picked = np.minimum(
            np.array(skipped)[:, None] + np.arange(columns), self._tables.shape[1] - 1
        )
        table = self._table.array[: len(rows), :columns]
        table[:] = self._tables[np.array(rows)[:, None], picked]
        return self._filled(lengths, columns, total)

    def blank(self, lengths: list[int], total: int) -> GroupTables:
        """Of a batch that touches no slot of the cache."""
        self._placed = []
        self._table.array[: len(lengths)] = 0
        self._slots.array[:total] = -1
        return self._filled(lengths, -(-max(lengths) // self._block_size), total)

    def _filled(self, lengths: list[int], columns: int, total: int) -> GroupTables:
        count = len(lengths)
        self._lengths.write(lengths)
        return GroupTables(
            seq_lens=self._lengths.tensor(count),
            block_table=self._table.tensor(count, columns),
            slot_mapping=self._slots.tensor(total),
            seq_lens_host=lengths,
        )


class _Buffer:
    """One array, as numpy, as torch, and as its twin on the device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> None:
        self._whole = device.host_zeros(shape, dtype)
        self._array: npt.NDArray[np.integer] = self._whole.numpy()
        self._bytes = self._array.data
        self._letter = {torch.int64: "q", torch.int32: "i"}[dtype]
        self._written: list[int] | None = None
        """What the array begins with; None where that is not known."""
        self._changed = True
        """Whether it was written since its last copy to the device."""
        self._on_host = device.on_host
        self._there = self._whole if self._on_host else device.zeros(shape, dtype)
        self._view, self._size = self._there, shape

    @property
    def array(self) -> npt.NDArray[np.integer]:
        """To be written."""
        self._written, self._changed = None, True
        return self._array

    def write(self, values: list[int]) -> None:
        """The first entries of a flat array; nothing is done where they stand there already."""
        if values != self._written:
            pack_into(f"={len(values)}{self._letter}", self._bytes, 0, *values)
            self._written, self._changed = values.copy(), True

    def tensor(self, *size: int) -> Tensor:
        """The first rows, and columns, on the device, where they always lie at the same place."""
        if size != self._size:
            self._view = self._there[: size[0]]
            if len(size) > 1:
                self._view = self._view[:, : size[1]]
            self._size, self._changed = size, True
        if self._changed and not self._on_host:
            rows = slice(0, size[0])
            self._there[rows].copy_(self._whole[rows], non_blocking=True)
            self._changed = False
        return self._view


def _state(new: NewSequence, num_groups: int) -> SequenceState:
    return SequenceState(
        seq_id=new.seq_id,
        params=new.params,
        token_ids=list(new.token_ids),
        prompt_len=new.prompt_len,
        block_ids=[[] for _ in range(num_groups)],
        eos_token_ids=new.eos_token_ids,
        bad_words_token_ids=new.bad_words_token_ids,
        token_type_ids=new.token_type_ids,
    )
