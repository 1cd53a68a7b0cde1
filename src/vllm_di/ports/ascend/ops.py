"""The op library of torch-npu's fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_di.components.interfaces import Device
from vllm_di.components.ops.torch import TorchOps
from vllm_di.ports.ascend.vendor import require

ROTARY_MULTIPLE = 16
"""What npu_mrope's rotary dimension must be a multiple of, in float32."""


class AscendOps(TorchOps):
    """Norms, rotary and the MLP's gates. Products and the rest are torch's own operators, which
    torch-npu implements for its device."""

    implements = frozenset(
        {"rms_norm", "add_rms_norm", "rotary_embedding", "silu_and_mul", "gelu_tanh_and_mul"}
    )

    def __init__(self, device: Device) -> None:
        require(
            device,
            "npu::npu_rms_norm",
            "npu::npu_add_rms_norm",
            "npu::npu_mrope",
            "npu::npu_rotary_mul",
            "npu::npu_swiglu",
            "npu::npu_geglu",
        )
        self._npu = torch.ops.npu

    def describe(self) -> dict[str, str]:
        return dict.fromkeys(self.implements, "npu (torch-npu)")

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor = self._npu.npu_rms_norm(x.contiguous(), weight, eps)[0]
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        out, _, total = self._npu.npu_add_rms_norm(x, residual, weight, eps)
        return out, total

    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        """In float32: the kernels take all operands in one dtype, and a table rounded to bfloat16
        would turn by the wrong angles."""
        mode = "interleave" if interleaved else "half"
        size = cos_sin.shape[-1]
        if size % ROTARY_MULTIPLE:
            cos, sin = cos_sin[positions].chunk(2, -1)  # [tokens, size / 2] each
            cos, sin = _spread(cos, interleaved), _spread(sin, interleaved)
            return self._turn(q, cos, sin, mode), self._turn(k, cos, sin, mode)
        turned = self._npu.npu_mrope(
            positions,
            q.flatten(1).float(),
            k.flatten(1).float(),
            cos_sin,
            q.shape[-1],
            mrope_section=[0, 0, 0],
            rotary_mode=mode,
        )
        new_q, new_k = (
            t.view(old.shape).to(old.dtype) for t, old in zip(turned, (q, k), strict=True)
        )
        return new_q, new_k

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
        """x [tokens, heads, head_size]; cos and sin [1, tokens, 1, rotary_dim]."""
        turning, rest = x[None, ..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        turned = self._npu.npu_rotary_mul(turning.float().contiguous(), cos, sin, mode)
        return torch.cat([turned[0].to(x.dtype), rest], -1)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        out: Tensor = self._npu.npu_swiglu(x.contiguous(), -1)
        return out

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        # approximate=1 is the tanh form; activate_left: the gate is the first half
        out: Tensor = self._npu.npu_geglu(x.contiguous(), -1, approximate=1, activate_left=True)[0]
        return out


def _spread(half: Tensor, interleaved: bool) -> Tensor:
    """A number for each pair [tokens, n] -> one for each element [1, tokens, 1, 2 n]."""
    whole = half.repeat_interleave(2, -1) if interleaved else torch.cat([half, half], -1)
    return whole[None, :, None]
