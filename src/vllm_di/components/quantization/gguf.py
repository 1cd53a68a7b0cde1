"""Weights as a GGUF file holds them, in 4 or 8 bits; what it holds in floats stays so."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_di.components.interfaces import OpTable, Quantization
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.components.quantized import QuantizedWeight


class GgufQuantization(Quantization):
    """Never dequantises a linear weight. With weights from elsewhere it does what ``none`` does."""

    replayable = True
    takes_quantized = True

    def __init__(self, ops: OpTable) -> None:
        self._plain = NoQuantization(ops)
        self._pack, self._product = ops.pack_quantized, ops.quantized_linear

    def linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor]:
        if not isinstance(weight, QuantizedWeight):
            return self._plain.linear(weight, bias, out_dtype)
        packed, product = self._pack(weight), self._product

        def run(x: Tensor) -> Tensor:
            return product(x, packed, bias, out_dtype)

        return run
