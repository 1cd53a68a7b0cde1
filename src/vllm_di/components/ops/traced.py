"""The ops for programs that trace a step and hand it to a compiler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_di.components import products
from vllm_di.components.interfaces import Activation
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.quantized import QuantizedWeight

SAMPLER_OPS = ("greedy_sample", "top_k_top_p_sample")
"""Ops that the sampler calls, outside the compiled step."""
CACHE_OPS = ("write_kv", "rotary_write_kv", "paged_attention")
"""Ops that attention exports in a form of its own."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """(q - zero) * scale: the form that compilers know as a compressed weight."""

    q: Tensor  # [out, groups, group] uint8
    scale: Tensor  # [out, groups, 1] fp32
    zero: Tensor  # [out, groups, 1] fp32


class TracedOps(TorchOps):
    """The torch reference, traced into the step. Ops whose reference depends on values of tensors
    are rewritten here without. ``compiler`` is a name for ``explain``."""

    implements = frozenset(TorchOps.OPS) - {*CACHE_OPS, *SAMPLER_OPS}
    asks_host = frozenset()

    def __init__(self, *, compiler: str) -> None:
        super().__init__()
        self._compiler = compiler

    def describe(self) -> dict[str, str]:
        rows = dict.fromkeys(self.implements, f"{self._compiler} compiler")
        rows |= dict.fromkeys(CACHE_OPS, "attention exports its own")
        return rows | dict.fromkeys(SAMPLER_OPS, "the sampler runs outside the compiled step")

    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        """In the form that compilers recognise as one node, with fp32 cosines in any precision: x *
        cos + rotate_half(x) * sin over four dimensions."""
        if interleaved:
            return super().rotary_embedding(positions, q, k, cos_sin, interleaved)
        cos, sin = cos_sin[positions].chunk(2, -1)  # [tokens, rotary_dim / 2] each
        cos, sin = (torch.cat((x, x), -1)[:, None, None] for x in (cos, sin))
        return _rotate_halves(q, cos, sin), _rotate_halves(k, cos, sin)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        dtype = out_dtype or x.dtype
        return products.linear(
            x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )

    def pack_quantized(self, weight: QuantizedWeight) -> Compressed:
        rows, groups = weight.scale.shape
        scale, offset = weight.scale.float(), weight.offset.float()
        flat = scale == 0  # a group of equal weights
        scale = torch.where(flat, 1.0, scale)
        q = weight.q.view(rows, groups, -1) * ~flat[..., None]
        return Compressed(q, scale[..., None], (-offset / scale)[..., None])

    def quantized_linear(
        self,
        x: Tensor,
        weight: Compressed,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        wide = (weight.q.float() - weight.zero) * weight.scale
        return self.linear(x, wide.flatten(1).to(x.dtype), bias, out_dtype)

    def fused_experts(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Activation,
    ) -> Tensor:
        """Every expert on every token, with weight zero where it was not chosen."""
        act = self.silu_and_mul if activation == "silu" else self.gelu_tanh_and_mul
        inner = act(products.matmul(x, gate_up.mT))  # [experts, tokens, inter]
        out = products.matmul(inner, down.mT).float()  # [experts, tokens, hidden]
        weights = x.new_zeros((x.shape[0], gate_up.shape[0]), dtype=torch.float32)
        weights = weights.scatter_add(1, topk_ids, topk_weights.float())
        return (out * weights.t()[..., None]).sum(0).to(x.dtype)


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_size]; cos, sin [tokens, 1, 1, rotary_dim] -> as x."""
    size = cos.shape[-1]
    wide = x.float().unsqueeze(2)
    turning, rest = wide[..., :size], wide[..., size:]
    half = torch.cat((-turning[..., size // 2 :], turning[..., : size // 2]), -1)
    out = turning * cos + half * sin
    if size < x.shape[-1]:
        out = torch.cat((out, rest), -1)
    return out.squeeze(2).to(x.dtype)
