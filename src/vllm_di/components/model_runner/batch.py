"""The live sequences of a rank, and the buffers in which each step's batch is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_di.components.interfaces import BatchPlan, Device, GroupTables, SequenceState
from vllm_di.components.messages import KvGroup, NewSequence, ScheduledSequence, StepPlan


class Batch:
    """Keeps sequences between steps and turns a StepPlan into a BatchPlan.

    All arrays are allocated once and reused: numpy writes them, torch sees the same memory. On a
    device each has a twin, to which it is copied without waiting. A plan is good until the next
    one is built.
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
    ) -> None:
        self.sequences: dict[int, SequenceState] = {}
        self._row_of: dict[int, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._max_num_seqs, self._max_model_len = max_num_seqs, max_model_len
        self._block_size, self._mark = block_size, device.mark
        self._copied: Callable[[], None] = device.mark()
        """Returns when the last plan's arrays have been copied and may be written again."""
        self._tokens = _Buffer((max_num_tokens,), torch.int64, device)
        self._positions = _Buffer((max_num_tokens,), torch.int64, device)
        self._rows = _Buffer((max_num_tokens,), torch.int64, device)
        self._starts = _Buffer((max_num_seqs + 1,), torch.int32, device)
        columns = -(-max_model_len // block_size)
        self._groups = [
            Tables(group, max_num_seqs, max_num_tokens, columns, block_size, device)
            for group in groups
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
        for share in plan.scheduled:
            state = self.sequences[share.seq_id]
            state.token_ids += share.new_tokens
            row = self._row_of[share.seq_id]
            for tables, held, fresh in zip(
                self._groups, state.block_ids, share.new_blocks, strict=True
            ):
                if fresh:
                    tables.append(row, len(held), fresh)
                    held += fresh

    def build(
        self, scheduled: Sequence[ScheduledSequence], logits_rows: list[int], padded: int
    ) -> BatchPlan:
        """The batch of one step; ``padded`` rows in all, those beyond the last token go nowhere."""
        count = len(scheduled)
        queries = [s.num_tokens for s in scheduled]
        firsts = [s.num_computed for s in scheduled]
        total = sum(queries)
        self._copied()
        if total == count:
            self._place_decodes(scheduled, firsts)
        else:
            self._place_chunks(scheduled, queries, firsts)
        self._pad(total, padded)
        self._rows.array[: len(logits_rows)] = logits_rows
        rows = [self._row_of[s.seq_id] for s in scheduled]
        owners = None if total == count else np.repeat(rows, queries)
        positions = self._positions.array[:total]
        tables = [g.place(rows, queries, firsts, owners, positions, padded) for g in self._groups]
        return self._plan(padded, len(logits_rows), queries, tables)

    def blank(self, num_tokens: int) -> BatchPlan:
        """A batch of one sequence that touches no slot of the cache, for warm-up. Rows beyond the
        longest sequence are padding."""
        length = min(num_tokens, self._max_model_len)
        self._blank_rows(length, num_tokens)
        self._positions.array[:length] = self._arange[:length]
        self._starts.array[:2] = (0, length)
        return self._plan(num_tokens, 1, [length], self._blank_tables([length], num_tokens))

    def blank_decodes(self, num_tokens: int) -> BatchPlan:
        """The same of sequences of one token each, for graphs of decode steps. Rows beyond the
        most sequences are padding."""
        count = min(num_tokens, self._max_num_seqs)
        self._blank_rows(count, num_tokens)
        self._starts.array[: count + 1] = self._arange[: count + 1]
        queries = [1] * count
        return self._plan(num_tokens, count, queries, self._blank_tables(queries, num_tokens))

    def _blank_rows(self, used: int, padded: int) -> None:
        self._copied()
        self._pad(0, padded)
        self._rows.array[:used] = self._arange[:used]

    def _blank_tables(self, lengths: list[int], padded: int) -> list[GroupTables]:
        return [group.blank(lengths, padded) for group in self._groups]

    def _place_decodes(self, scheduled: Sequence[ScheduledSequence], firsts: Sequence[int]) -> None:
        """One token each: tokens, positions and starts."""
        count = len(scheduled)
        self._tokens.array[:count] = [
            self.sequences[share.seq_id].token_ids[share.num_computed] for share in scheduled
        ]
        self._positions.array[:count] = firsts
        self._starts.array[: count + 1] = self._arange[: count + 1]

    def _place_chunks(
        self,
        scheduled: Sequence[ScheduledSequence],
        queries: Sequence[int],
        firsts: Sequence[int],
    ) -> None:
        """Any number of tokens each."""
        count = len(scheduled)
        start = 0
        for share in scheduled:
            first, end = share.num_computed, start + share.num_tokens
            ids = self.sequences[share.seq_id].token_ids[first : first + share.num_tokens]
            self._tokens.array[start : start + len(ids)] = ids
            self._tokens.array[start + len(ids) : end] = share.draft_tokens
            start = end
        starts = self._starts.array[: count + 1]
        starts[0] = 0
        np.cumsum(queries, out=starts[1:])
        shifts = np.array(firsts, np.int64) - starts[:-1]
        np.add(self._arange[:start], np.repeat(shifts, queries), out=self._positions.array[:start])

    def _pad(self, total: int, padded: int) -> None:
        if padded > total:
            self._tokens.array[total:padded] = 0
            self._positions.array[total:padded] = 0

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
        )
        self._copied = self._mark()
        return plan


class Tables:
    """One KvGroup's block tables, and the buffers of a step's lengths, tables and slots."""

    def __init__(
        self,
        group: KvGroup,
        max_num_seqs: int,
        max_num_tokens: int,
        columns: int,
        block_size: int,
        device: Device,
    ) -> None:
        self._group, self._block_size = group, block_size
        self._tables = np.zeros((max_num_seqs, columns), np.int32)
        """[rows of sequences, blocks since their first token]"""
        self._lengths = _Buffer((max_num_seqs,), torch.int32, device)
        self._table = _Buffer((max_num_seqs, columns), torch.int32, device)
        self._slots = _Buffer((max_num_tokens,), torch.int64, device)

    def append(self, row: int, start: int, blocks: Sequence[int]) -> None:
        """Blocks ``start`` and on of the sequence in ``row``."""
        self._tables[row, start : start + len(blocks)] = blocks

    def place(
        self,
        rows: Sequence[int],
        queries: Sequence[int],
        firsts: Sequence[int],
        owners: npt.NDArray[np.integer] | None,
        positions: npt.NDArray[np.integer],
        padded: int,
    ) -> GroupTables:
        """The tables of a step: of each sequence its row here, its number of queries, the position
        of the first; owners [tokens]: the row of each token's sequence, None where each sequence
        has one token."""
        size, total, slots = self._block_size, len(positions), self._slots.array
        if owners is None:  # numbers of Python are faster than arrays of a few
            block_at = self._tables.item
            slots[:total] = [
                block_at(row, at // size) * size + at % size
                for row, at in zip(rows, firsts, strict=True)
            ]
        else:
            blocks, offsets = np.divmod(positions, size)
            slots[:total] = self._tables[owners, blocks].astype(np.int64) * size + offsets
        if padded > total:
            slots[total:padded] = -1
        lengths = [first + number for first, number in zip(firsts, queries, strict=True)]
        if self._group.window is not None and max(firsts) >= self._group.window:
            return self._cut_off(rows, firsts, lengths, padded)
        columns = -(-max(lengths) // size)
        self._table.array[: len(rows), :columns] = self._tables[rows, :columns]
        return self._filled(lengths, columns, padded)

    def _cut_off(
        self, rows: Sequence[int], firsts: Sequence[int], lengths: list[int], padded: int
    ) -> GroupTables:
        """As above, without the blocks that the window has left."""
        size = self._block_size
        skipped = [self._group.first_block(position, size) for position in firsts]
        lengths = [n - skip * size for n, skip in zip(lengths, skipped, strict=True)]
        columns = -(-max(lengths) // size)
        # a shorter sequence's columns may run beyond the table: nobody reads them
        picked = np.minimum(
            np.array(skipped)[:, None] + np.arange(columns), self._tables.shape[1] - 1
        )
        table = self._table.array[: len(rows), :columns]
        table[:] = self._tables[np.array(rows)[:, None], picked]
        return self._filled(lengths, columns, padded)

    def blank(self, lengths: list[int], padded: int) -> GroupTables:
        """Of a batch that touches no slot of the cache."""
        self._table.array[: len(lengths)] = 0
        self._slots.array[:padded] = -1
        return self._filled(lengths, -(-max(lengths) // self._block_size), padded)

    def _filled(self, lengths: list[int], columns: int, padded: int) -> GroupTables:
        count = len(lengths)
        self._lengths.array[:count] = lengths
        return GroupTables(
            seq_lens=self._lengths.tensor(count),
            block_table=self._table.tensor(count)[:, :columns],
            slot_mapping=self._slots.tensor(padded),
            seq_lens_host=lengths,
        )


class _Buffer:
    """One array, as numpy, as torch, and as its twin on the device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> None:
        self._whole = device.host_zeros(shape, dtype)
        self.array: npt.NDArray[np.integer] = self._whole.numpy()
        self._on_host = device.on_host
        self._there = self._whole if self._on_host else device.zeros(shape, dtype)
        self._view = self._there

    def tensor(self, size: int) -> Tensor:
        """The first ``size`` rows on the device, where they always lie at the same place."""
        if len(self._view) != size:
            self._view = self._there[:size]
        if not self._on_host:
            self._view.copy_(self._whole[:size], non_blocking=True)
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
    )
