"""Quantised weights on the host: what loaders read, quantizations make and op libraries pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    order: Tensor | None = None
    """[in] int64, of weights in act-order: column i of q multiplies input order[i]. Op libraries
    never see one."""

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
        order = 0 if self.order is None else self.order.nbytes
        return self.q.numel() * self.bits // 8 + self.scale.numel() * 4 + order

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out, in], computed in fp32."""
        rows, groups = self.scale.shape
        q = self.q.view(rows, groups, -1).float()
        wide = (q * self.scale.float()[..., None] + self.offset.float()[..., None]).flatten(1)
        if self.order is not None:  # columns that fill up a group are zero
            inputs = int(self.order.max()) + 1
            wide = wide.new_zeros(rows, inputs).index_add_(1, self.order, wide)
        return wide.to(dtype)

    def in_order(self) -> QuantizedWeight:
        """Without ``order``: for inputs that were put in that order."""
        return replace(self, order=None)

    def rows(self, index: slice | Tensor) -> QuantizedWeight:
        return replace(self, q=self.q[index], scale=self.scale[index], offset=self.offset[index])

    def columns(self, span: slice) -> QuantizedWeight:
        """Raises ValueError for a span that cuts a group. One scale a row holds for any part of the
        row; kernels take it by whole groups of 32. In act-order, what the span has of each group
        becomes a group of its own, filled up to a multiple of 32 with columns that are zero."""
        start, stop, _ = span.indices(self.shape[1])
        if self.order is not None:
            return self._some_inputs(self.order, start, stop)
        if self.scale.shape[1] == 1 and start % GROUP == stop % GROUP == 0:
            return QuantizedWeight(self.q[:, span], self.scale, self.offset, self.bits)
        if start % self.group or stop % self.group:
            raise ValueError(f"inputs {start} to {stop} cut a group of {self.group} weights")
        groups = slice(start // self.group, stop // self.group)
        return QuantizedWeight(
            self.q[:, span], self.scale[:, groups], self.offset[:, groups], self.bits
        )

    def _some_inputs(self, order: Tensor, start: int, stop: int) -> QuantizedWeight:
        steps = torch.cat([self.scale, self.offset]).t()  # [groups of 32, 2 out]
        is_new = (steps[1:] != steps[:-1]).any(1)
        numbers = torch.cat([is_new.new_zeros(1), is_new]).cumsum(0)  # of larger groups
        here = ((order >= start) & (order < stop)).nonzero()[:, 0]
        own = numbers[here // self.group]
        counts = own.bincount(minlength=int(numbers[-1]) + 1)
        sizes = -(-counts // GROUP) * GROUP
        first = sizes.cumsum(0) - sizes - (counts.cumsum(0) - counts)
        place = first[own] + torch.arange(len(here), dtype=torch.int64)
        # [columns] -> a group of 32 with the scale of the larger one
        source = numbers.unique(return_counts=True)[1].cumsum(0) - 1
        columns = source.repeat_interleave(sizes)
        scale, offset = self.scale[:, columns], self.offset[:, columns]
        zero = (-offset.float() / scale.float()).nan_to_num(0, 0, 0).round_()
        q = zero.clamp_(0, 2**self.bits - 1).to(torch.uint8)
        q[:, place] = self.q[:, here]
        kept = order.new_full((len(columns),), 0)
        kept[place] = order[here] - start
        return QuantizedWeight(q, scale[:, ::GROUP], offset[:, ::GROUP], self.bits, kept)

    @staticmethod
    def are_alike(parts: Sequence[QuantizedWeight]) -> bool:
        """Whether all are in one order."""
        orders = [part.order for part in parts]
        first = orders[0]
        if first is None:
            return all(order is None for order in orders)
        return all(order is not None and torch.equal(order, first) for order in orders)

    @staticmethod
    def join(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """One below the other. 4 bits beside 8 become 8, which holds them exactly. Raises
        ValueError for parts in several orders."""
        if len(parts) == 1:
            return parts[0]
        if not QuantizedWeight.are_alike(parts):
            raise ValueError("weights in several act-orders are no single weight")
        return QuantizedWeight(
            torch.cat([p.q for p in parts]),
            torch.cat([p.scale for p in parts]),
            torch.cat([p.offset for p in parts]),
            max(p.bits for p in parts),
            parts[0].order,
        )

    @staticmethod
    def beside(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """One beside the other, of the same shape and groups, not in act-order."""
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
