"""OpenVINO's PagedAttention: as a node of a compiled model, and the torch op that marks its place
while a step is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_di.components.interfaces import AttentionSpec
from vllm_di.errors import PortError
from vllm_di.ports.openvino.device import load_openvino

NAME = "vllm_di_openvino::paged_attention"
BLOCK = 32
"""Tokens in a block of the CPU plugin's cache."""
TESTED = "2026.4"
"""The release whose inputs of the op stand here: it is experimental and they change."""


@torch.library.custom_op(NAME, mutates_args=("key_cache", "value_cache"))
def mark(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    past_lens: Tensor,
    begins: Tensor,
    blocks: Tensor,
    block_begins: Tensor,
    max_context: Tensor,
    scale: float,
    window: int,
    num_kv_heads: int,
    head_size: int,
) -> Tensor:
    """Rows of q, k, v hold all heads, [tokens, heads * head_size]; the caches are whatever the
    plugin's layout is. Writes k and v to the cache, then attends. -> as q."""
    raise RuntimeError("this op stands for a node of a compiled model: take program=openvino")


@mark.register_fake
def _(q: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(q)


def flat_call(
    q: Tensor, k: Tensor, v: Tensor, caches: Sequence[Tensor], batch: Any, spec: AttentionSpec
) -> Tensor:
    """The mark, in place of attention on q [tokens, heads, head_size]."""
    out: Tensor = mark(
        q.flatten(1),
        k.flatten(1),
        v.flatten(1),
        *caches,
        batch.past_lens,
        batch.begins,
        batch.blocks,
        batch.block_begins,
        batch.max_context,
        spec.scale,
        spec.window or 0,
        spec.num_kv_heads,
        spec.head_size,
    )
    return out.view(-1, spec.num_heads, spec.head_size)


def convert_mark(context: Any) -> list[Any]:
    """The PyTorch frontend's translation of the mark."""
    given = [context.get_input(i) for i in range(context.get_input_size())]
    scale, window, kv_heads, head_size = (x.get_node().get_data().item() for x in given[10:])
    return [attention_node(given[:10], scale, window, kv_heads, head_size).output(0)]


def attention_node(
    given: Sequence[Any], scale: float, window: int, kv_heads: int, head_size: int
) -> Any:
    """``given``: the outputs of q, k, v, both caches, past_lens, begins, blocks, block_begins and
    max_context. Raises PortError for a release whose op takes other inputs."""
    ov = load_openvino()
    from openvino import opset15 as ops
    from openvino.op import _PagedAttentionExtension

    def number(value: float, kind: Any) -> Any:
        return ops.constant(np.array(value), kind).output(0)

    def absent(kind: Any) -> Any:
        return ops.constant(np.zeros(0), kind).output(0)

    i32, f32, u8 = ov.Type.i32, ov.Type.f32, ov.Type.u8
    inputs = [
        *given[:9],
        number(scale, f32),
        number(window, i32),  # tokens that a query sees; 0: all
        absent(f32),  # slopes of ALiBi
        given[9],
        absent(i32),  # window over which scores are summed for eviction
        *(absent(i32), absent(i32), absent(f32)),  # rotation of cached keys: blocks, deltas, table
        *(absent(f32), number(0, i32), number(0, i32)),  # XAttention: threshold, block, stride
        absent(f32),  # attention sinks
        *(number(0, i32), absent(i32), absent(i32), absent(i32)),  # adaptive eviction
        absent(i32),  # token types, for images
        *(absent(u8), absent(i32)),  # bias between queries
    ]
    try:
        node = _PagedAttentionExtension(inputs)
    except RuntimeError as error:
        raise PortError(
            f"openvino {ov.__version__.split('-')[0]}: its PagedAttention takes other inputs than "
            f"that of {TESTED}, for which this port was written: pip install 'vllm-di[openvino]'"
        ) from error
    for kind in ("k", "v"):
        node.get_rt_info()[f"num_{kind}_heads"] = kv_heads
        node.get_rt_info()[f"{kind}_head_size"] = head_size
    return node
