"""Quantised weights on the host: what loaders read, quantizations make and op libraries pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
"""Weights along ``in`` that share a scale, as in GGUF's simple types."""
ZERO = 128
"""The byte that stands for 0 in weights by channel."""


@dataclass(slots=True)
class QuantizedWeight:
    """weight = scale * q + offset, for a group of weights along ``in``, or for a whole row."""

    q: Tensor  # [out, in] uint8; below 16 where bits is 4
    scale: Tensor  # [out, in / group]: fp16 or fp32 by group, fp32 by channel
    offset: Tensor  # [out, in / group], like scale
    bits: int  # 4 or 8

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """What it takes in memory when it is packed: scale and offset of a group in fp16, or the
        scale of a row in fp32."""
        return self.q.numel() * self.bits // 8 + self.scale.numel() * 4

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out, in], computed in fp32."""
        rows, groups = self.scale.shape
        q = self.q.view(rows, groups, -1).float()
        wide = q * self.scale.float()[..., None] + self.offset.float()[..., None]
        return wide.view(self.shape).to(dtype)

    def rows(self, index: slice | Tensor) -> QuantizedWeight:
        return QuantizedWeight(self.q[index], self.scale[index], self.offset[index], self.bits)

    def columns(self, span: slice) -> QuantizedWeight:
        """Raises ValueError for a span that cuts a group. One scale a row holds for any part of the
        row; kernels take it by whole groups of 32."""
        start, stop, _ = span.indices(self.shape[1])
        if self.scale.shape[1] == 1 and start % GROUP == stop % GROUP == 0:
            return QuantizedWeight(self.q[:, span], self.scale, self.offset, self.bits)
        if start % self.group or stop % self.group:
            raise ValueError(f"inputs {start} to {stop} cut a group of {self.group} weights")
        groups = slice(start // self.group, stop // self.group)
        return QuantizedWeight(
            self.q[:, span], self.scale[:, groups], self.offset[:, groups], self.bits
        )

    @staticmethod
    def join(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """One below the other. 4 bits beside 8 become 8, which holds them exactly."""
        if len(parts) == 1:
            return parts[0]
        return QuantizedWeight(
            torch.cat([p.q for p in parts]),
            torch.cat([p.scale for p in parts]),
            torch.cat([p.offset for p in parts]),
            max(p.bits for p in parts),
        )

    @staticmethod
    def beside(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """One beside the other, of the same shape and groups."""
        return QuantizedWeight(
            torch.cat([p.q for p in parts], 1),
            torch.cat([p.scale for p in parts], 1),
            torch.cat([p.offset for p in parts], 1),
            max(p.bits for p in parts),
        )


def by_channel(weight: Tensor) -> QuantizedWeight:
    """8 bits, one scale for each row of [out, in], symmetric: q = round(w / scale) + 128 with scale
    = max |w| / 127."""
    wide = weight.float()
    scale = wide.abs().amax(1, keepdim=True) / 127
    q = torch.where(scale > 0, wide / scale, 0.0).round_().add_(ZERO).to(torch.uint8)
    return QuantizedWeight(q, scale, -ZERO * scale, 8)


def by_group(weight: Tensor, bits: int) -> QuantizedWeight:
    """Groups of 32 along ``in``: from the least to the largest of a group in even steps. Raises
    ValueError when the inputs are no multiple of 32."""
    rows, inputs = weight.shape
    if inputs % GROUP:
        raise ValueError(f"{inputs} inputs are no multiple of a group of {GROUP} weights")
    wide = weight.float().view(rows, -1, GROUP)
    least, most = wide.aminmax(dim=-1, keepdim=True)
    levels = 2**bits - 1
    scale, offset = ((most - least) / levels).half(), least.half()
    steps = (wide - offset.float()) / scale.float()
    q = torch.where(scale > 0, steps, 0.0).round_().clamp_(0, levels).to(torch.uint8)
    return QuantizedWeight(q.view(rows, inputs), scale[..., 0], offset[..., 0], bits)
