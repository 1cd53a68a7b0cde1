"""Attention over a TPU's cache: a mark in a traced step, and the same code called by itself."""

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
from vllm_di.components.interfaces.attention import fixed
from vllm_di.errors import ConfigError
from vllm_di.ports.tpu.device import tpu_device
from vllm_di.ports.tpu.kv_layout import TpuLayout


@dataclass(slots=True)
class RaggedBatch:
    """What ragged paged attention wants to know of a step."""

    seq_lens: Tensor  # [seqs] int32
    block_table: Tensor  # [seqs, columns] int32
    query_start: Tensor  # [seqs + 1] int32
    slots: Tensor  # [tokens] int64; -1 for none
    counts: Tensor = fixed(0)  # noqa: RUF009
    """[3] int32: ends of the decodes, of the prefills, of all sequences"""


class MarkedBatch(RaggedBatch):
    """The same, while a step is traced."""


@torch.library.custom_op("vllm_di_tpu::ragged_paged_attention", mutates_args=("cache",))
def mark(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    slots: Tensor,
    counts: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> Tensor:
    """q [tokens, heads, head_size], k and v [tokens, kv_heads, head_size]; no window and no soft
    cap are 0. Writes k and v to the cache, then attends. -> as q."""
    raise RuntimeError("this op stands for a kernel of a compiled step: take program=tpu")


@mark.register_fake
def _(q: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(q)


class TpuAttention(AttentionBackend):
    """Exported, it is a mark that the program lowers: to jnp on the host, to the vendor's kernel on
    a TPU. Called eagerly (``program=eager``), it runs the jnp form on a copy of the cache."""

    layouts = ("tpu",)

    def __init__(self, device: Device, kv_layout: KvLayout) -> None:
        self._device = tpu_device(device, "attention=tpu")
        if not isinstance(kv_layout, TpuLayout):
            raise ConfigError(
                f"attention=tpu reads the KV layout 'tpu', not {kv_layout.name!r}; take "
                "kv_layout=tpu"
            )

    def check(self, spec: AttentionSpec) -> None:
        check_spec(spec)

    def build(self, batch: BatchPlan, out: Any | None = None) -> RaggedBatch:
        return RaggedBatch(*_describe(batch))

    def export(self) -> Callable[[BatchPlan], MarkedBatch]:
        return lambda batch: MarkedBatch(*_describe(batch))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        m: RaggedBatch = metadata
        tables = (m.seq_lens, m.block_table, m.query_start, m.slots, m.counts)
        options = (spec.scale, spec.window or 0, spec.soft_cap or 0.0)
        kept = cache.tensors[0]
        if isinstance(metadata, MarkedBatch):
            marked: Tensor = mark(q, k, v, kept, *tables, *options)
            return marked
        from vllm_di.ports.tpu.arrays import to_jax, to_torch
        from vllm_di.ports.tpu.ragged import alone

        given = [to_jax(tensor) for tensor in (q, k, v, kept, *tables)]
        out, written = alone(*given, *options)
        kept.copy_(to_torch(written))
        return to_torch(out)


def _describe(batch: BatchPlan) -> tuple[Tensor, ...]:
    """The fields of a RaggedBatch. Padding sequences, which come last, are not counted."""
    count = sum(queries > 0 for queries in batch.query_lens_host)
    counts = torch.tensor((0, 0, count), dtype=torch.int32)
    return batch.seq_lens, batch.block_table, batch.query_start, batch.slot_mapping, counts
