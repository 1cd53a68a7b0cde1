"""GEMMs with quantised weights through the op table, shared by all quantizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.interfaces import Activation, OpTable
from vllm_di.components.quantized import QuantizedWeight


class QuantizedProducts:
    """Packs once, then multiplies."""

    def __init__(self, ops: OpTable) -> None:
        self._ops, self._fused = ops, "gated_quantized_linear" in ops.fusions

    def linear(
        self, weight: QuantizedWeight, bias: Tensor | None, out_dtype: torch.dtype | None
    ) -> Callable[[Tensor], Tensor]:
        return self._product(self._ops.pack_quantized(weight), bias, out_dtype)

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
        packed = self._ops.pack_quantized(weight)
        return self._product(packed, None, out_dtype), self._ops.packed_embedding(packed, dtype)

    def gated_linear(
        self, weight: QuantizedWeight, bias: Tensor | None, activation: Activation
    ) -> Callable[[Tensor], Tensor] | None:
        if not self._fused:
            return None
        packed, product = self._ops.pack_gated_quantized(weight), self._ops.gated_quantized_linear

        def run(x: Tensor) -> Tensor:
            return product(x, packed, bias, activation)

        return run
