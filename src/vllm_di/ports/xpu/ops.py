"""The op library of Intel's SYCL kernels, from the package vllm-xpu-kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_di.components.interfaces import Device, OpLibrary
from vllm_di.ports.xpu.vendor import load

FUSED_HEADS = (64, 128, 256, 512)
"""Head sizes that fused_qk_norm_rope is compiled for."""
FUSED_DTYPES = (torch.bfloat16, torch.float16)
SUB_GROUP = 32
"""Lanes that share a head in fused_qk_norm_rope."""


class XpuKernels(OpLibrary):
    """Norms, rotary, the MLP's gates. ``simulated``: the device is, and stand-ins run."""

    reuses = frozenset({"capture"})

    def __init__(self, device: Device, *, simulated: bool = False) -> None:
        load(device, simulated=simulated)
        self._kernels = torch.ops._C
        self._where = f"vllm-xpu-kernels{' (simulated: stand-ins)' if simulated else ''}"

    def describe(self) -> dict[str, str]:
        rows = dict.fromkeys(self.implements, self._where)
        rows["rotary_embedding"] += "; in fp32"
        rows["fused_qk_norm_rope"] += (
            f"; heads of {', '.join(map(str, FUSED_HEADS))} in bf16 and fp16, others unfused"
        )
        return rows

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.numel():
            self._kernels.rms_norm(out, x if x.dim() > 1 else x[None], weight, eps)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """In place: the sum is written to the memory of ``residual``, its norm to that of ``x``."""
        x, residual = x.contiguous(), residual.contiguous()
        if x.numel():
            rows = x.view(-1, x.shape[-1])
            self._kernels.fused_add_rms_norm(rows, residual.view(rows.shape), weight, eps)
        return x, residual

    def silu_and_mul(self, x: Tensor) -> Tensor:
        out = _halves(x)
        self._kernels.silu_and_mul(out, x.contiguous())
        return out

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        out = _halves(x)
        self._kernels.gelu_tanh_and_mul(out, x.contiguous())
        return out

    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        """In float32: the kernel takes queries and table in one dtype, and a table rounded to
        bfloat16 would turn by the wrong angles."""
        if not len(q):
            return q, k
        wide_q, wide_k = q.float().contiguous(), k.float().contiguous()
        self._kernels.rotary_embedding(
            positions.contiguous(), wide_q, wide_k, q.shape[-1], cos_sin, not interleaved
        )
        return wide_q.to(q.dtype), wide_k.to(k.dtype)

    def fused_qk_norm_rope(
        self,
        positions: Tensor,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        cos_sin: Tensor,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        """In place. What its kernel was not compiled for takes the two of norm and rotary."""
        size, rotary = len(q_weight), cos_sin.shape[1]
        if not (size in FUSED_HEADS and qkv.dtype in FUSED_DTYPES and _pairs(size, rotary)):
            return super().fused_qk_norm_rope(
                positions,
                qkv,
                num_heads,
                num_kv_heads,
                q_weight,
                k_weight,
                eps,
                cos_sin,
                interleaved,
            )
        qkv = qkv.contiguous()
        if len(qkv):
            self._kernels.fused_qk_norm_rope(
                *(qkv, num_heads, num_kv_heads, num_kv_heads, size, eps, q_weight, k_weight),
                *(cos_sin, not interleaved, positions.contiguous()),
            )
        widths = [num_heads * size, num_kv_heads * size, num_kv_heads * size]
        q, k, _ = qkv.split(widths, -1)
        return q.view(-1, num_heads, size), k.view(-1, num_kv_heads, size)


def _halves(x: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


def _pairs(size: int, rotary: int) -> bool:
    """Whether the kernel finds the partner of each element: it lies in the lane whose number
    differs in one bit, so that half the rotary size must be a power of two of whole lanes."""
    lanes, rest = divmod(rotary // 2, size // SUB_GROUP)
    return rest == 0 and lanes > 0 and lanes & (lanes - 1) == 0
