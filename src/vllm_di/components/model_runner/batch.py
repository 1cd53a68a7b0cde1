"""The live sequences of a rank, and the buffers in which each step's batch is built."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_di.components.interfaces import BatchPlan, SequenceState
from vllm_di.components.messages import ScheduledSequence, StepPlan


class Batch:
    """Keeps sequences between steps and turns a StepPlan into a BatchPlan.

    All arrays are allocated once and reused: numpy writes them, torch sees the same memory.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.sequences: dict[int, SequenceState] = {}
        self._row_of: dict[int, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self._block_size, self._device = block_size, device
        self._tokens = _Buffer(max_num_tokens, np.int64)
        self._positions = _Buffer(max_num_tokens, np.int64)
        self._slots = _Buffer(max_num_tokens, np.int64)
        self._rows = _Buffer(max_num_tokens, np.int64)
        self._starts = _Buffer(max_num_seqs + 2, np.int32)
        self._lengths = _Buffer(max_num_seqs + 1, np.int32)
        self._arange = np.arange(max_num_tokens, dtype=np.int64)

    def update(self, plan: StepPlan) -> None:
        """Forget what ended, take in what is new, append sampled tokens and fresh blocks."""
        for seq_id in plan.finished:
            if self.sequences.pop(seq_id, None) is not None:
                self._free_rows.append(self._row_of.pop(seq_id))
        for new in plan.new:
            self.sequences[new.seq_id] = SequenceState(
                seq_id=new.seq_id,
                params=new.params,
                token_ids=list(new.token_ids),
                prompt_len=new.prompt_len,
                block_ids=[],
                eos_token_ids=new.eos_token_ids,
                bad_words_token_ids=new.bad_words_token_ids,
            )
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
        rows = [self._row_of[s.seq_id] for s in scheduled]
        queries = [s.num_tokens for s in scheduled]
        computed = np.fromiter((s.num_computed for s in scheduled), np.int64, count)
        lens = np.array(queries, np.int64)
        lengths = computed + lens
        total = int(lens.sum())
        starts = self._starts.array
        starts[0] = 0
        np.cumsum(lens, out=starts[1 : count + 1])
        positions = self._positions.array[:total]
        if total == count:  # decode alone: one token each
            sequences = [self.sequences[s.seq_id].token_ids for s in scheduled]
            tokens = [ids[s.num_computed] for ids, s in zip(sequences, scheduled, strict=True)]
            self._tokens.array[:total] = tokens
            positions[:] = computed
            owner = self._arange[:count]
        else:
            for s, start in zip(scheduled, starts[:count].tolist(), strict=True):
                ids = self.sequences[s.seq_id].token_ids
                end = s.num_computed + s.num_tokens
                self._tokens.array[start : start + s.num_tokens] = ids[s.num_computed : end]
            owner = np.repeat(self._arange[:count], lens)
            np.add(self._arange[:total], (computed - starts[:count])[owner], out=positions)
        size = self._block_size
        columns = -(-int(lengths.max()) // size)
        table = self._tables[rows, :columns]
        blocks = table[owner, positions // size].astype(np.int64)
        self._slots.array[:total] = blocks * size + positions % size
        for buffer in (self._tokens, self._positions):
            buffer.array[total:padded] = 0
        self._slots.array[total:padded] = -1
        self._lengths.array[:count] = lengths
        self._rows.array[: len(logits_rows)] = logits_rows
        return BatchPlan(
            token_ids=self._tokens.tensor(padded, self._device),
            positions=self._positions.tensor(padded, self._device),
            query_start=self._starts.tensor(count + 1, self._device),
            seq_lens=self._lengths.tensor(count, self._device),
            block_table=torch.from_numpy(table).to(self._device),
            slot_mapping=self._slots.tensor(padded, self._device),
            logits_rows=self._rows.tensor(len(logits_rows), self._device),
            query_lens_host=queries,
            seq_lens_host=lengths.tolist(),
        )

    def blank(self, num_tokens: int) -> BatchPlan:
        """A batch of one sequence that touches no slot of the cache, for warm-up."""
        self._tokens.array[:num_tokens] = 0
        self._positions.array[:num_tokens] = self._arange[:num_tokens]
        self._slots.array[:num_tokens] = -1
        self._starts.array[:2] = (0, num_tokens)
        self._lengths.array[:1] = num_tokens
        self._rows.array[:1] = num_tokens - 1
        columns = -(-num_tokens // self._block_size)
        return BatchPlan(
            token_ids=self._tokens.tensor(num_tokens, self._device),
            positions=self._positions.tensor(num_tokens, self._device),
            query_start=self._starts.tensor(2, self._device),
            seq_lens=self._lengths.tensor(1, self._device),
            block_table=torch.zeros(1, columns, dtype=torch.int32, device=self._device),
            slot_mapping=self._slots.tensor(num_tokens, self._device),
            logits_rows=self._rows.tensor(1, self._device),
            query_lens_host=[num_tokens],
            seq_lens_host=[num_tokens],
        )


class _Buffer:
    """One array, as numpy and as torch."""

    def __init__(self, size: int, dtype: npt.DTypeLike) -> None:
        self.array: npt.NDArray[np.integer] = np.zeros(size, dtype)
        self._tensor = torch.from_numpy(self.array)

    def tensor(self, size: int, device: torch.device) -> Tensor:
        """The first ``size`` entries on the device; a view where that is the host."""
        view = self._tensor[:size]
        return view if device.type == "cpu" else view.to(device)
