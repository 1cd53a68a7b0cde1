"""Products with quantised weights through the op table: what all quantizations share."""

from __future__ import annotations

from collections.abc import Callable

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
        packed, product = self._ops.pack_quantized(weight), self._ops.quantized_linear

        def run(x: Tensor) -> Tensor:
            return product(x, packed, bias, out_dtype)

        return run

    def gated_linear(
        self, weight: QuantizedWeight, bias: Tensor | None, activation: Activation
    ) -> Callable[[Tensor], Tensor] | None:
        if not self._fused:
            return None
        packed, product = self._ops.pack_gated_quantized(weight), self._ops.gated_quantized_linear

        def run(x: Tensor) -> Tensor:
            return product(x, packed, bias, activation)

        return run
