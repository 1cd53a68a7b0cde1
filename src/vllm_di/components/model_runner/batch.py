"""The live sequences of a rank, and the buffers in which each step's batch is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_di.components.interfaces import BatchPlan, Device, SequenceState
from vllm_di.components.messages import NewSequence, ScheduledSequence, StepPlan


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
        device: Device,
    ) -> None:
        self.sequences: dict[int, SequenceState] = {}
        self._row_of: dict[int, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._table = _Buffer(self._tables.shape, torch.int32, device)
        self._max_num_seqs, self._max_model_len = max_num_seqs, max_model_len
        self._block_size, self._mark = block_size, device.mark
        self._copied: Callable[[], None] = device.mark()
        """Returns when the last plan's arrays have been copied and may be written again."""
        self._tokens = _Buffer((max_num_tokens,), torch.int64, device)
        self._positions = _Buffer((max_num_tokens,), torch.int64, device)
        self._slots = _Buffer((max_num_tokens,), torch.int64, device)
        self._rows = _Buffer((max_num_tokens,), torch.int64, device)
        self._starts = _Buffer((max_num_seqs + 1,), torch.int32, device)
        self._lengths = _Buffer((max_num_seqs,), torch.int32, device)
        self._arange = np.arange(max_num_tokens, dtype=np.int64)

    def update(self, plan: StepPlan) -> None:
        """Forget what ended, take in what is new, append sampled tokens and fresh blocks."""
        for seq_id in plan.finished:
            if self.sequences.pop(seq_id, None) is not None:
                self._free_rows.append(self._row_of.pop(seq_id))
        for new in plan.new:
            self.sequences[new.seq_id] = _state(new)
            self._row_of[new.seq_id] = self._free_rows.pop()
        for share in plan.scheduled:
            state = self.sequences[share.seq_id]
            if share.last_token >= 0:
                state.token_ids.append(share.last_token)
            if share.new_blocks:
                had = len(state.block_ids)
                state.block_ids += share.new_blocks
                row = self._tables[self._row_of[share.seq_id]]
                row[had : len(state.block_ids)] = share.new_blocks

    def build(
        self, scheduled: Sequence[ScheduledSequence], logits_rows: list[int], padded: int
    ) -> BatchPlan:
        """The batch of one step; ``padded`` rows in all, those beyond the last token go nowhere."""
        count = len(scheduled)
        queries = [s.num_tokens for s in scheduled]
        lengths = [s.num_computed + s.num_tokens for s in scheduled]
        total = sum(queries)
        rows = [self._row_of[s.seq_id] for s in scheduled]
        columns = -(-max(lengths) // self._block_size)
        self._copied()
        table = self._table.array[:count, :columns]
        table[:] = self._tables[rows, :columns]
        if total == count:
            self._place_decodes(scheduled)
        else:
            self._place_chunks(scheduled, table)
        self._pad(total, padded)
        self._rows.array[: len(logits_rows)] = logits_rows
        return self._plan(padded, len(logits_rows), columns, queries, lengths)

    def blank(self, num_tokens: int) -> BatchPlan:
        """A batch of one sequence that touches no slot of the cache, for warm-up. Rows beyond the
        longest sequence are padding."""
        length = min(num_tokens, self._max_model_len)
        self._blank_rows(length, num_tokens)
        self._positions.array[:length] = self._arange[:length]
        self._starts.array[:2] = (0, length)
        return self._plan(num_tokens, 1, -(-length // self._block_size), [length], [length])

    def blank_decodes(self, num_tokens: int) -> BatchPlan:
        """The same of sequences of one token each, for graphs of decode steps. Rows beyond the
        most sequences are padding."""
        count = min(num_tokens, self._max_num_seqs)
        self._blank_rows(count, num_tokens)
        self._starts.array[: count + 1] = self._arange[: count + 1]
        return self._plan(num_tokens, count, 1, [1] * count, [1] * count)

    def _blank_rows(self, used: int, padded: int) -> None:
        self._copied()
        self._pad(0, padded)
        self._table.array[:] = 0
        self._rows.array[:used] = self._arange[:used]

    def _place_decodes(self, scheduled: Sequence[ScheduledSequence]) -> None:
        """One token each: tokens, positions, slots and starts."""
        count, size = len(scheduled), self._block_size
        states = [self.sequences[s.seq_id] for s in scheduled]
        places = [s.num_computed for s in scheduled]
        pairs = list(zip(states, places, strict=True))
        self._tokens.array[:count] = [state.token_ids[at] for state, at in pairs]
        self._positions.array[:count] = places
        self._slots.array[:count] = [
            state.block_ids[at // size] * size + at % size for state, at in pairs
        ]
        self._starts.array[: count + 1] = self._arange[: count + 1]

    def _place_chunks(
        self, scheduled: Sequence[ScheduledSequence], table: npt.NDArray[np.integer]
    ) -> None:
        """Any number of tokens each. table [seqs, columns]: the blocks of this step's sequences."""
        count, size = len(scheduled), self._block_size
        start = 0
        for share in scheduled:
            first, end = share.num_computed, start + share.num_tokens
            ids = self.sequences[share.seq_id].token_ids[first : first + share.num_tokens]
            self._tokens.array[start:end] = ids
            start = end
        queries = np.array([s.num_tokens for s in scheduled], np.int64)
        computed = np.array([s.num_computed for s in scheduled], np.int64)
        starts = self._starts.array[: count + 1]
        starts[0] = 0
        np.cumsum(queries, out=starts[1:])
        owner = np.repeat(self._arange[:count], queries)  # [tokens]: row of the table
        positions = self._positions.array[:start]
        np.add(self._arange[:start], (computed - starts[:-1])[owner], out=positions)
        blocks, offsets = np.divmod(positions, size)
        self._slots.array[:start] = table[owner, blocks].astype(np.int64) * size + offsets

    def _pad(self, total: int, padded: int) -> None:
        if padded > total:
            self._tokens.array[total:padded] = 0
            self._positions.array[total:padded] = 0
            self._slots.array[total:padded] = -1

    def _plan(
        self, num_tokens: int, num_rows: int, columns: int, queries: list[int], lengths: list[int]
    ) -> BatchPlan:
        count = len(queries)
        self._lengths.array[:count] = lengths
        plan = BatchPlan(
            token_ids=self._tokens.tensor(num_tokens),
            positions=self._positions.tensor(num_tokens),
            query_start=self._starts.tensor(count + 1),
            seq_lens=self._lengths.tensor(count),
            block_table=self._table.tensor(count)[:, :columns],
            slot_mapping=self._slots.tensor(num_tokens),
            logits_rows=self._rows.tensor(num_rows),
            query_lens_host=queries,
            seq_lens_host=lengths,
        )
        self._copied = self._mark()
        return plan


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


def _state(new: NewSequence) -> SequenceState:
    return SequenceState(
        seq_id=new.seq_id,
        params=new.params,
        token_ids=list(new.token_ids),
        prompt_len=new.prompt_len,
        block_ids=[],
        eos_token_ids=new.eos_token_ids,
        bad_words_token_ids=new.bad_words_token_ids,
    )
