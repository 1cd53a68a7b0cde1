"""Slots of a worker that compute: ops, layout of the cache, attention, weights' products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_di.components.interfaces import (
    Activation,
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    CacheTensor,
    Device,
    KvLayout,
    LayerCache,
    OpTable,
    Quantization,
)
from vllm_di.components.messages import KvSpec
from vllm_di.errors import ConfigError


class FrozenOps(OpTable):
    """Each op as its text says it, reduced in fp32."""

    def __init__(self) -> None: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        return (wide * scale * weight.float()).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        stream = x + residual
        return self.rms_norm(stream, weight, eps), stream

    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin[positions][:, None].chunk(2, -1)  # [tokens, 1, rotary_dim / 2]
        width = 2 * cos.shape[-1]

        def rotated(x: Tensor) -> Tensor:
            part = x[..., :width].float()
            if interleaved:
                a, b = part[..., 0::2], part[..., 1::2]
                part = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
            else:
                a, b = part.chunk(2, -1)
                part = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
            return torch.cat((part.to(x.dtype), x[..., width:]), -1)

        return rotated(q), rotated(k)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up

    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        dtype = out_dtype or x.dtype
        wide = None if bias is None else bias.to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), wide)

    def quantized_linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        product = self.linear(x.float(), weight.dequantize(torch.float32), bias)
        return product.to(out_dtype or x.dtype)

    def _gate(self, activation: Activation) -> Callable[[Tensor], Tensor]:
        return self.silu_and_mul if activation == "silu" else self.gelu_tanh_and_mul

    def gated_linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        return self._gate(activation)(self.linear(x, weight, bias))

    def gated_quantized_linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        return self._gate(activation)(self.quantized_linear(x, weight, bias))

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return weight[token_ids]

    def fused_experts(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Activation,
    ) -> Tensor:
        out = torch.zeros_like(x, dtype=torch.float32)
        for token, (experts, shares) in enumerate(
            zip(topk_ids.tolist(), topk_weights.float(), strict=True)
        ):
            for expert, share in zip(experts, shares, strict=True):
                inner = self._gate(activation)(self.linear(x[token], gate_up[expert]))
                out[token] += share * self.linear(inner, down[expert]).float()
        return out.to(x.dtype)

    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        size = key_cache.shape[2]
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                key_cache[slot // size, :, slot % size] = k[token]
                value_cache[slot // size, :, slot % size] = v[token]

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        out, starts = torch.zeros_like(q), query_start.tolist()
        for row, length in enumerate(seq_lens.tolist()):
            queries = slice(starts[row], starts[row + 1])
            used = block_table[row, : -(-length // key_cache.shape[2])].long()
            # -> [length, kv_heads, head_size]
            keys, values = (
                cache[used].transpose(1, 2).flatten(0, 1)[:length]
                for cache in (key_cache, value_cache)
            )
            out[queries] = attend(q[queries], keys, values, scale, window, soft_cap)
        return out

    def greedy_sample(self, logits: Tensor) -> Tensor:
        best = torch.full((len(logits),), -1, dtype=torch.int64)
        for row, values in enumerate(logits):
            if values.max().isfinite():
                best[row] = (values == values.max()).nonzero()[0, 0]
        return best

    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        return torch.stack(
            [_draw(*row) for row in zip(logits, top_k, top_p, min_p, uniform, strict=True)]
        )


def _draw(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """One row: logits [vocab] and four numbers -> the id."""
    values, ids = logits.sort(descending=True, stable=True)
    last = values[min(int(top_k), len(values)) - 1]
    probs = values.masked_fill(values < last, -torch.inf).softmax(-1)
    keep = (probs.cumsum(-1) - probs < top_p) & (probs >= min_p * probs[0])
    keep[0] = True
    mass = (probs * keep).cumsum(-1)
    place = int((mass <= uniform * mass[-1]).sum())
    return ids[min(place, int(keep.sum()) - 1)]


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """q [queries, heads, head_size], the last of keys, values [length, kv_heads, head_size]."""
    group = q.shape[1] // keys.shape[1]
    keys = keys.float().repeat_interleave(group, 1)
    values = values.float().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    column = torch.arange(len(keys))
    position = torch.arange(len(keys) - len(q), len(keys))[:, None]
    seen = column <= position
    if window is not None:
        seen &= column > position - window
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


class FrozenLayout(KvLayout):
    """One tensor a layer: [blocks, block_size, 2, kv_heads, head_size], keys first."""

    name = "frozen_2_0"

    def __init__(self, device: Device, *, block_size: int) -> None:
        self.device, self.block_size = device, block_size

    def describe(self, spec: KvSpec, dtype: torch.dtype) -> tuple[CacheTensor, ...]:
        shape = (self.block_size, 2, spec.num_kv_heads, spec.head_size)
        return (CacheTensor("key_value", shape, dtype),)

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        keep = slot_mapping >= 0
        cache.tensors[0].flatten(0, 1)[slot_mapping[keep]] = torch.stack((k, v), 1)[keep]

    def gather(self, cache: LayerCache, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        used = blocks[: -(-length // self.block_size)].long()
        keys, values = cache.tensors[0][used].flatten(0, 1)[:length].unbind(1)
        return keys, values


class FrozenAttention(AttentionBackend):
    """One sequence after another, through the layout."""

    layouts = ("frozen_2_0",)

    def __init__(self, kv_layout: KvLayout) -> None:
        self._layout = kv_layout

    def build(self, batch: BatchPlan, out: Any | None = None) -> BatchPlan:
        return batch

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        plan: BatchPlan = metadata
        self._layout.write(cache, k, v, plan.slot_mapping)
        out, start = torch.zeros_like(q), 0
        for row, count in enumerate(plan.query_lens_host):
            if count:  # none: a sequence that pads the batch
                length = plan.seq_lens_host[row]
                keys, values = self._layout.gather(cache, plan.block_table[row], length)
                queries = slice(start, start + count)
                out[queries] = attend(
                    q[queries], keys, values, spec.scale, spec.window, spec.soft_cap
                )
                start += count
        return out


class FrozenQuantization(Quantization):
    """None: weights stay as they are."""

    def __init__(self, ops: OpTable) -> None:
        self._ops = ops

    def linear(
        self, weight: Any, bias: Tensor | None, out_dtype: torch.dtype | None = None
    ) -> Callable[[Tensor], Tensor]:
        if not isinstance(weight, Tensor):
            raise ConfigError("quantization=frozen_2_0 takes plain weights alone")
        packed = self._ops.pack_linear(weight)
        return lambda x: self._ops.linear(x, packed, bias, out_dtype)
