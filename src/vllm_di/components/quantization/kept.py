"""Weights in the 4 or 8 bits of the checkpoint. What it holds as floats stays floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_di.components.interfaces import Activation, ExpertsFunction, OpTable, Quantization
from vllm_di.components.quantization.experts import QuantizedExperts
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.components.quantization.products import QuantizedProducts
from vllm_di.components.quantized import QuantizedWeight


class KeptWeights(Quantization):
    """Never dequantises a weight of a linear layer or an expert. With weights from elsewhere it
    does what ``none`` does."""

    reuses = frozenset({"record", "capture"})
    takes_quantized = True
    takes_experts = True
    takes_order = True

    def __init__(self, ops: OpTable) -> None:
        self._plain = NoQuantization(ops)
        self._products = QuantizedProducts(ops)
        self._experts = QuantizedExperts(ops)
        self.experts_ask_host = self._experts.asks_host

    def linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor]:
        if not isinstance(weight, QuantizedWeight):
            return self._plain.linear(weight, bias, out_dtype)
        return self._products.linear(weight, bias, out_dtype)

    def tied_linear(
        self, weight: Tensor | QuantizedWeight, dtype: torch.dtype, out_dtype: torch.dtype
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        if not isinstance(weight, QuantizedWeight):
            return self._plain.tied_linear(weight, dtype, out_dtype)
        return self._products.tied_linear(weight, dtype, out_dtype)

    def gated_linear(
        self, weight: Tensor | QuantizedWeight, bias: Tensor | None, activation: Activation
    ) -> Callable[[Tensor], Tensor] | None:
        if not isinstance(weight, QuantizedWeight):
            return self._plain.gated_linear(weight, bias, activation)
        return self._products.gated_linear(weight, bias, activation)

    def experts(
        self,
        gate_up: Sequence[Tensor | QuantizedWeight],
        down: Sequence[Tensor | QuantizedWeight],
        activation: Activation,
    ) -> ExpertsFunction | None:
        pairs = [
            (inner, outer)
            for inner, outer in zip(gate_up, down, strict=True)
            if isinstance(inner, QuantizedWeight) and isinstance(outer, QuantizedWeight)
        ]
        if not pairs:
            return None
        inner, outer = zip(*pairs, strict=True)
        return self._experts.function(inner, outer, activation)
