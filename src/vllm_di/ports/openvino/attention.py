"""Attention by OpenVINO's PagedAttention op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_di.components.attention.spec import check_layout, check_spec
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    Device,
    KvLayout,
    LayerCache,
)
from vllm_di.errors import ConfigError
from vllm_di.ports.openvino.device import load_openvino, openvino_device
from vllm_di.ports.openvino.paged_attention import BLOCK, attention_node, flat_call
from vllm_di.ports.openvino.tensors import to_openvino, to_torch


@dataclass(slots=True)
class PagedBatch:
    """What the op wants to know of a step."""

    past_lens: Tensor  # [seqs] int32: tokens cached before this step
    begins: Tensor  # [seqs + 1] int32: first query row of each sequence
    blocks: Tensor  # [all blocks] int32: the blocks in use, sequence by sequence
    block_begins: Tensor  # [seqs + 1] int32: first entry of each sequence in ``blocks``
    max_context: Tensor  # [] int32: the longest context after this step


class MarkedBatch(PagedBatch):
    """The same, while a step is traced."""


class OpenVinoAttention(AttentionBackend):
    """Exported, it is a node of the compiled step. Called eagerly (``program=eager``), it runs the
    same node in a compiled model of its own."""

    layouts = ("hnd", "openvino_u8")
    block_sizes = (BLOCK,)

    def __init__(self, device: Device, kv_layout: KvLayout) -> None:
        self._device = openvino_device(device, "attention=openvino")
        check_layout(self, kv_layout)
        self._alone: dict[Any, Callable[..., Tensor]] = {}
        _one_node(AttentionSpec(num_heads=1, num_kv_heads=1, head_size=BLOCK, scale=1.0))

    def check(self, spec: AttentionSpec) -> None:
        check_spec(spec)
        if spec.soft_cap is not None:
            raise ConfigError(
                f"model.attn_logit_softcapping {spec.soft_cap:g}: OpenVINO's PagedAttention has no "
                "soft cap; take attention=sdpa"
            )

    def build(self, batch: BatchPlan, out: Any | None = None) -> PagedBatch:
        return PagedBatch(*_describe(batch))

    def export(self) -> Callable[[BatchPlan], MarkedBatch]:
        return lambda batch: MarkedBatch(*_describe(batch))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        caches = (cache.key, cache.value)
        if isinstance(metadata, MarkedBatch):
            return flat_call(q, k, v, caches, metadata, spec)
        key = (spec, q.dtype, cache.key.dtype)
        if key not in self._alone:
            self._alone[key] = self._compile(spec, q.dtype, cache.key.dtype)
        batch: PagedBatch = metadata
        rows = [x.flatten(1).float().contiguous() for x in (q, k, v)]
        facts = (batch.past_lens, batch.begins, batch.blocks, batch.block_begins, batch.max_context)
        return self._alone[key](*rows, *caches, *facts).to(q.dtype).view(q.shape)

    def _compile(
        self, spec: AttentionSpec, dtype: torch.dtype, cache_dtype: torch.dtype
    ) -> Callable[..., Tensor]:
        compiled = self._device.compile(_one_node(spec), dtype, cache_dtype, None)
        request = compiled.create_infer_request()

        def run(*tensors: Tensor) -> Tensor:
            for i, tensor in enumerate(tensors):
                request.set_input_tensor(i, to_openvino(tensor))
            request.infer()
            return to_torch(request.get_output_tensor(0))

        return run

    def close(self) -> None:
        self._alone.clear()


def _one_node(spec: AttentionSpec) -> Any:
    """A model of one node: fp32 rows in and out. Raises PortError for another release's node."""
    ov = load_openvino()
    from openvino.op import Parameter

    def parameter(kind: Any, shape: list[int]) -> Any:
        return Parameter(kind, ov.PartialShape(shape))

    width, kv_width = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    rows = [parameter(ov.Type.f32, [-1, w]) for w in (width, kv_width, kv_width)]
    caches = [parameter(ov.Type.dynamic, [-1, -1, -1, -1]) for _ in range(2)]
    facts = [parameter(ov.Type.i32, shape) for shape in ([-1], [-1], [-1], [-1], [])]
    inputs = [*rows, *caches, *facts]
    node = attention_node(
        [x.output(0) for x in inputs],
        spec.scale,
        spec.window or 0,
        spec.num_kv_heads,
        spec.head_size,
    )
    return ov.Model([node.output(0)], inputs)


def _describe(batch: BatchPlan) -> tuple[Tensor, ...]:
    """The fields of a PagedBatch."""
    lengths = np.array(batch.seq_lens_host, np.int32)
    counts = -(-lengths // BLOCK)
    begins = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(counts, out=begins[1:])
    table = batch.block_table.numpy()
    blocks = table[np.arange(table.shape[1]) < counts[:, None]]
    past = lengths - np.array(batch.query_lens_host, np.int32)
    arrays = (past, batch.query_start.numpy(), blocks, begins, np.array(lengths.max(), np.int32))
    return tuple(torch.from_numpy(array) for array in arrays)
