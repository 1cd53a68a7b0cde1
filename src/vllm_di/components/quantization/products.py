"""GEMMs with quantised weights through the op table, shared by all quantizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.interfaces import Activation, OpTable
from vllm_di.components.quantized import QuantizedWeight


class QuantizedProducts:
    """Packs once, then multiplies. Of a weight in act-order the inputs are put in its order, by
    torch."""

    def __init__(self, ops: OpTable) -> None:
        self._ops, self._fused = ops, "gated_quantized_linear" in ops.fusions

    def linear(
        self, weight: QuantizedWeight, bias: Tensor | None, out_dtype: torch.dtype | None
    ) -> Callable[[Tensor], Tensor]:
        packed = self._ops.pack_quantized(weight.in_order())
        return _reordered(self._product(packed, bias, out_dtype), weight.order)

    def _product(
        self, packed: Any, bias: Tensor | None, out_dtype: torch.dtype | None
    ) -> Callable[[Tensor], Tensor]:
        product = self._ops.quantized_linear

        def run(x: Tensor) -> Tensor:
            return product(x, packed, bias, out_dtype)

        return run

    def tied_linear(
        self, weight: QuantizedWeight, dtype: torch.dtype, out_dtype: torch.dtype
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        packed = self._ops.pack_quantized(weight.in_order())
        product = _reordered(self._product(packed, None, out_dtype), weight.order)
        rows = self._ops.packed_embedding(packed, dtype)
        if rows is None or weight.order is None:
            return product, rows
        back = weight.order.argsort()
        return product, lambda token_ids: rows(token_ids).index_select(1, back.to(token_ids.device))

    def gated_linear(
        self, weight: QuantizedWeight, bias: Tensor | None, activation: Activation
    ) -> Callable[[Tensor], Tensor] | None:
        if not self._fused:
            return None
        packed = self._ops.pack_gated_quantized(weight.in_order())
        product = self._ops.gated_quantized_linear

        def run(x: Tensor) -> Tensor:
            return product(x, packed, bias, activation)

        return _reordered(run, weight.order)


def _reordered(
    product: Callable[[Tensor], Tensor], order: Tensor | None
) -> Callable[[Tensor], Tensor]:
    if order is None:
        return product
    where: dict[torch.device, Tensor] = {}

    def run(x: Tensor) -> Tensor:
        if x.device not in where:
            where[x.device] = order.to(x.device)
        return product(x.index_select(1, where[x.device]))

    return run
