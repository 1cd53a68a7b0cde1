"""No quantization: weights stay in the model's dtype, packed as the op library likes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_di.components.interfaces import Activation, OpTable, Quantization
from vllm_di.components.quantized import QuantizedWeight


class NoQuantization(Quantization):
    """``ops.pack_linear`` once, then ``ops.linear``."""

    replayable = True

    def __init__(self, ops: OpTable) -> None:
        self._ops, self._fused = ops, "gated_linear" in ops.fusions

    def linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor]:
        assert isinstance(weight, Tensor)
        packed, product = self._ops.pack_linear(weight), self._ops.linear

        def run(x: Tensor) -> Tensor:
            return product(x, packed, bias, out_dtype)

        return run

    def gated_linear(
        self, weight: Tensor | QuantizedWeight, bias: Tensor | None, activation: Activation
    ) -> Callable[[Tensor], Tensor] | None:
        assert isinstance(weight, Tensor)
        if not self._fused:
            return None
        packed, product = self._ops.pack_gated_linear(weight), self._ops.gated_linear

        def run(x: Tensor) -> Tensor:
            return product(x, packed, bias, activation)

        return run
