"""Paged attention by the two ops that Spyre's compiler knows, as ibm-fms 1.13.1 declares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.attention.spec import check_spec
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    Device,
    KvLayout,
    LayerCache,
)
from vllm_di.components.vendor_operators import check_operators
from vllm_di.errors import ConfigError
from vllm_di.ports.spyre.device import spyre_device
from vllm_di.ports.spyre.kv_layout import BLOCK, SpyreLayout

SCHEMAS = {
    "spyre::paged_attn_store": (
        "(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping) -> "
        "(Tensor, Tensor)"
    ),
    "spyre::paged_attn_compute": (
        "(Tensor query, Tensor key_cache, Tensor value_cache, float scale, Tensor "
        "current_tkv_mask, Tensor left_padded_prompt_mask, Tensor block_table) -> Tensor"
    ),
}
"""Both give new tensors: the cache that was given is dead."""


@dataclass(slots=True)
class SpyreBatch:
    """A step as a rectangle of sequences and queries. A row of the block table ends with the
    sequence's last block; before its first one stands block 0, which is no context."""

    rows: Tensor  # [seqs, queries] int64: the token of each query; any of padding
    places: Tensor  # [tokens] int64: where a token stands in ``rows``, flattened; any of padding
    slots: Tensor  # [seqs, queries] int64; of padding in block 0, or behind the sequence's last
    tkv: Tensor  # [seqs] int64: columns in use, from the table's first: padding, then context
    left: Tensor  # [seqs] int64: columns of the padding, whole blocks
    table: Tensor  # [seqs, columns] int64


class TracedBatch(SpyreBatch):
    """The same, while a step is traced."""


class SpyreAttention(AttentionBackend):
    """Stores a step's keys and values, then attends over the cache that comes back."""

    layouts = ("nhd",)

    def __init__(self, device: Device, kv_layout: KvLayout) -> None:
        spyre_device(device, "attention=spyre")
        if not isinstance(kv_layout, SpyreLayout):
            raise ConfigError(
                f"attention=spyre reads blocks of {BLOCK} as [blocks, {BLOCK}, kv_heads, "
                f"head_size], not the KV layout {kv_layout.name!r}; take kv_layout=spyre"
            )
        check_operators(
            device,
            [*SCHEMAS],
            SCHEMAS,
            missing={"spyre": "take ibm-fms 1.13"},
            changed="ibm-fms 1.13",
        )
        self._layout = kv_layout

    def check(self, spec: AttentionSpec) -> None:
        check_spec(spec)
        for what, value in (("a sliding window", spec.window), ("a soft cap", spec.soft_cap)):
            if value is not None:
                raise ConfigError(
                    f"the op spyre::paged_attn_compute lacks {what} (of {value:g}); take "
                    "attention=sdpa"
                )

    def build(self, batch: BatchPlan, out: Any | None = None) -> SpyreBatch:
        return SpyreBatch(*_rectangle(batch, -1))

    def export(self) -> Callable[[BatchPlan], TracedBatch]:
        return lambda batch: TracedBatch(*_rectangle(batch, 0))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        m: SpyreBatch = metadata
        q, k, v = q[m.rows], k[m.rows], v[m.rows]
        key, value = cache.key, cache.value
        if isinstance(metadata, TracedBatch):
            key, value = torch.ops.spyre.paged_attn_store(k, v, key, value, m.slots)
        else:  # nobody would take what comes back
            self._layout.write(cache, k.flatten(0, 1), v.flatten(0, 1), m.slots.flatten())
        out: Tensor = torch.ops.spyre.paged_attn_compute(
            q, key, value, spec.scale, m.tkv, m.left, m.table
        )
        return out.flatten(0, 1)[m.places]


def _rectangle(plan: BatchPlan, nowhere: int) -> tuple[Tensor, ...]:
    """The fields of a SpyreBatch; ``nowhere`` is the slot of padding before the tokens.

    The rows of a prompt end where its last block ends, so that padding before its tokens is by
    blocks. What is padded behind them is written to that block, where later tokens take its place;
    what is padded before them, to block 0."""
    width, columns = plan.max_query_len, plan.block_table.shape[1]
    lengths, start = plan.seq_lens.long(), plan.query_start[:-1].long()
    counts = plan.query_start[1:].long() - start
    table = plan.block_table.long()
    used = (lengths.clamp(min=1) + BLOCK - 1) // BLOCK  # blocks; of padding one, which is block 0
    whole = plan.padded_to is not None and width > 1
    end = used * BLOCK if whole else lengths.clamp(min=1)
    position = (
        end[:, None] - width + torch.arange(width, dtype=torch.int64, device=lengths.device)
    )  # [seqs, queries]
    offset = position - (lengths - counts)[:, None]
    is_token = (offset >= 0) & (offset < counts[:, None])
    last = (counts - 1).clamp(min=0)[:, None]
    rows = start[:, None] + torch.minimum(offset.clamp(min=0), last)
    rows = rows.clamp(max=len(plan.token_ids) - 1)
    behind = (offset >= counts[:, None]) & (counts > 0)[:, None]
    column = (position.clamp(min=0) // BLOCK).clamp(max=columns - 1)
    slots = torch.where(behind, table.gather(1, column) * BLOCK + position % BLOCK, nowhere)
    slots = torch.where(is_token, plan.slot_mapping[rows].clamp(min=nowhere), slots)
    places = plan.slot_mapping.new_zeros(len(plan.token_ids))
    flat = torch.arange(rows.numel(), dtype=torch.int64, device=rows.device).view_as(rows)
    places[rows[is_token]] = flat[is_token]
    padding = columns - used
    shifted = torch.arange(columns, dtype=torch.int64, device=table.device) - padding[:, None]
    return (
        rows,
        places,
        slots,
        padding * BLOCK + end,
        padding * BLOCK,
        torch.where(shifted >= 0, table.gather(1, shifted.clamp(min=0)), 0),
    )
