"""The reference of every op, in plain torch: what the others are compared with.

What is not here is in the op's declaration (``components/interfaces/ops.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_di.components import products
from vllm_di.components.interfaces import Activation, OpLibrary


class TorchOps(OpLibrary):
    """Plain torch on any device and dtype. Reductions run in fp32."""

    implements = frozenset(OpLibrary.OPS)
    methods = frozenset()
    reuses = frozenset({"compile", "capture"})
    asks_host = frozenset({"fused_experts", "write_kv", "rotary_write_kv", "paged_attention"})

    def __init__(self) -> None: ...

    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin[positions].chunk(2, -1)  # [tokens, rotary_dim / 2] each
        cos, sin = cos[:, None], sin[:, None]
        return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)

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
        if out_dtype is None or out_dtype == x.dtype:
            return products.linear(x, weight, bias)
        # a wide copy of a slice of the weight at a time: the whole one would double the memory
        starts = range(0, weight.shape[0], 8192)
        parts = [
            products.linear(x.to(out_dtype), weight[i : i + 8192].to(out_dtype)) for i in starts
        ]
        out = torch.cat(parts, -1)
        return out if bias is None else out + bias

    def quantized_linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        starts = range(0, weight.shape[0], 8192)  # a slice at a time, as above
        slices = (weight.rows(slice(start, start + 8192)) for start in starts)
        out = torch.cat(
            [products.linear(x.float(), s.dequantize(torch.float32)) for s in slices], -1
        )
        return (out if bias is None else out + bias).to(out_dtype or x.dtype)

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(token_ids, weight)

    def fused_experts(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Activation,
    ) -> Tensor:
        act = self.silu_and_mul if activation == "silu" else self.gelu_tanh_and_mul
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            rows, place = torch.where(topk_ids == expert)
            hidden = products.linear(act(products.linear(x[rows], gate_up[expert])), down[expert])
            out.index_add_(0, rows, hidden.float() * topk_weights[rows, place, None].float())
        return out.to(x.dtype)

    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        keep = slot_mapping >= 0
        slots = slot_mapping[keep]
        block = torch.div(slots, key_cache.shape[2], rounding_mode="floor")
        offset = slots % key_cache.shape[2]
        key_cache[block, :, offset] = k[keep].to(key_cache.dtype)
        value_cache[block, :, offset] = v[keep].to(value_cache.dtype)

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
        out = torch.zeros_like(q)
        starts, lengths = query_start.tolist(), seq_lens.tolist()
        num_kv_heads, block_size, head_size = key_cache.shape[1:]
        for row, length in enumerate(lengths):
            queries = q[starts[row] : starts[row + 1]]
            if not len(queries):
                continue
            blocks = block_table[row, : -(-length // block_size)].long()
            # [blocks, kv_heads, block_size, head_size] -> [kv_heads, length, head_size]
            keys, values = (
                c[blocks].transpose(0, 1).reshape(num_kv_heads, -1, head_size)[:, :length]
                for c in (key_cache, value_cache)
            )
            out[starts[row] : starts[row + 1]] = attend(
                queries, keys, values, scale, window, soft_cap
            )
        return out

    def greedy_sample(self, logits: Tensor) -> Tensor:
        peaks = logits.amax(-1, keepdim=True)  # NaN where one is in the row
        # torch.argmax names no order among equals: take the first of the maxima
        best = (logits == peaks).to(torch.uint8).argmax(-1)
        return best.where(peaks[:, 0].isfinite(), -1)

    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
        last = (top_k.clamp(1, logits.shape[-1]) - 1)[:, None]
        logits = logits.masked_fill(logits < logits.gather(-1, last), float("-inf"))
        probs = logits.softmax(-1)
        before = probs.cumsum(-1) - probs
        keep = (before < top_p[:, None]) & (probs >= min_p[:, None] * probs[:, :1])
        keep[:, 0] = True
        mass = (probs * keep).cumsum(-1)
        target = uniform[:, None] * mass[:, -1:]
        place = torch.searchsorted(mass, target, right=True)
        place = torch.minimum(place, keep.sum(-1, keepdim=True) - 1)
        return ids.gather(-1, place)[:, 0]


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of one sequence. q [queries, heads, head_size] are the last positions of
    keys and values [kv_heads, length, head_size], sinks [heads] -> [queries, heads, head_size]."""
    length, group = keys.shape[1], q.shape[1] // keys.shape[0]
    position = torch.arange(length - len(q), length, dtype=torch.int64, device=q.device)[
        :, None
    ]  # [queries, 1]
    column = torch.arange(length, dtype=torch.int64, device=q.device)  # [length]
    seen = column <= position
    if window is not None:
        seen &= column > position - window
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    if soft_cap is None and sinks is None:
        heads = q.transpose(0, 1)[None]  # [1, heads, queries, head_size]
        out = products.attention(heads, keys[None], values[None], seen, scale, grouped=group > 1)
        return out[0].transpose(0, 1)
    grouped = q.unflatten(1, (-1, group)).float()  # [queries, kv_heads, group, head_size]
    # -> [kv_heads, group, queries, length]
    scores = products.matmul(grouped.permute(1, 2, 0, 3), keys.float().mT[:, None]) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = softmax_with_sinks(scores.masked_fill(~seen, float("-inf")), sinks)
    mixed = products.matmul(weights, values.float()[:, None])
    return mixed.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """scores [..., kv_heads, group, queries, length] fp32 -> weights. With sinks [kv_heads * group]
    the weights of a query sum to less than one."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.to(scores.dtype).view(*scores.shape[-4:-2], 1, 1)
    sink = sink.expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [tokens, heads, head_size], cos and sin [tokens, 1, rotary_dim / 2] fp32."""
    turned, rest = x[..., : 2 * cos.shape[-1]].float(), x[..., 2 * cos.shape[-1] :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)
