"""Op libraries that are wrong in one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_di.components.interfaces import Activation
from vllm_di.components.ops.torch import TorchOps, _rotate


class Altered(TorchOps):
    """Claims the ops that a subclass writes itself; all others come from the reference."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.implements = frozenset(op for op in cls.OPS if op in vars(cls))


class EpsMissing(Altered):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, weight, 0.0)


class SilentCast(Altered):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x.half(), weight, eps).to(x.dtype)


class NanSwallowed(Altered):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x.nan_to_num(), weight, eps)


class StaleResidual(Altered):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self.rms_norm(x + residual, weight, eps), residual


class WrongDtype(Altered):
    def silu_and_mul(self, x: Tensor) -> Tensor:
        return super().silu_and_mul(x.float())


class GateSwapped(Altered):
    def silu_and_mul(self, x: Tensor) -> Tensor:
        up, gate = x.chunk(2, -1)
        return F.silu(gate) * up


class InputOverwritten(Altered):
    def silu_and_mul(self, x: Tensor) -> Tensor:
        found = super().silu_and_mul(x)
        x[..., : found.shape[-1]] = found
        return found


class ViewsIgnored(Altered):
    """Takes its input for contiguous."""

    def silu_and_mul(self, x: Tensor) -> Tensor:
        packed = torch.as_strided(x, x.shape, (x.shape[-1], 1), x.storage_offset())
        return super().silu_and_mul(packed)


class NoRowsCrash(Altered):
    def silu_and_mul(self, x: Tensor) -> Tensor:
        if not len(x):
            raise RuntimeError("a grid of 0 programs")
        return super().silu_and_mul(x)


class ExactGelu(Altered):
    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.gelu(gate) * up


class RopePairing(Altered):
    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        return super().rotary_embedding(positions, q, k, cos_sin, not interleaved)


class RopeSign(Altered):
    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin[positions].chunk(2, -1)
        turned = _rotate(q, cos[:, None], -sin[:, None], interleaved)
        return turned, super().rotary_embedding(positions, q, k, cos_sin, interleaved)[1]


class RopePositionOff(Altered):
    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        shifted = (positions + 1).clamp(max=len(cos_sin) - 1)
        return super().rotary_embedding(shifted, q, k, cos_sin, interleaved)


class RopeNarrow(Altered):
    """Rounds positions to bf16."""

    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        rounded = positions.bfloat16().long().clamp(max=len(cos_sin) - 1)
        return super().rotary_embedding(rounded, q, k, cos_sin, interleaved)


class RopeClamped(Altered):
    """Has a table of 2,048 positions."""

    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        return super().rotary_embedding(positions.clamp(max=2047), q, k, cos_sin, interleaved)


class WideWrong(Altered):
    """Counts outputs in signed 16 bits."""

    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        out = super().linear(x, weight, bias, out_dtype)
        out[..., 32_768:] = 0
        return out


class ArgmaxShort(Altered):
    """Sees the first 65,536 logits alone."""

    def greedy_sample(self, logits: Tensor) -> Tensor:
        return super().greedy_sample(logits[:, :65_536])


class BiasForgotten(Altered):
    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return super().linear(x, weight, None, out_dtype)


class TailDropped(Altered):
    """Sums whole groups of 8 inputs alone."""

    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        whole = max(1, x.shape[-1] // 8 * 8)
        return super().linear(x[..., :whole], weight[:, :whole], bias, out_dtype)


class NarrowLogits(Altered):
    """Rounds to x's dtype before it widens."""

    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return super().linear(x, weight, bias).to(out_dtype or x.dtype)


class GateIgnored(Altered):
    """Gates with SiLU whatever was asked for. A fused op's members come from the same library."""

    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return super().linear(x, weight, bias, out_dtype)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return super().silu_and_mul(x)

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        return super().gelu_tanh_and_mul(x)

    def gated_linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        return super().gated_linear(x, weight, bias, "silu")


class LastToken(Altered):
    """Looks every last token up as the one before."""

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return super().embedding(token_ids.clamp(max=max(0, len(weight) - 2)), weight)


class ExpertsUnweighted(Altered):
    def fused_experts(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Activation,
    ) -> Tensor:
        even = torch.full_like(topk_weights, 1 / topk_weights.shape[-1])
        return super().fused_experts(x, gate_up, down, even, topk_ids, activation)


class LastOfTies(Altered):
    def greedy_sample(self, logits: Tensor) -> Tensor:
        return logits.shape[-1] - 1 - super().greedy_sample(logits.flip(-1))


class TopKOff(Altered):
    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        return super().top_k_top_p_sample(logits, top_k + 1, top_p, min_p, uniform)


class TopPShort(Altered):
    """Leaves out the token that crosses the threshold."""

    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        short = torch.where(top_p < 1, top_p * 0.7, top_p)
        return super().top_k_top_p_sample(logits, top_k, short, min_p, uniform)


class MinPIgnored(Altered):
    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        return super().top_k_top_p_sample(logits, top_k, top_p, torch.zeros_like(min_p), uniform)


class SkewedDraws(Altered):
    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        return super().top_k_top_p_sample(logits, top_k, top_p, min_p, uniform**1.1)
