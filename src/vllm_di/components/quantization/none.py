"""No quantization: weights stay in the model's dtype, packed as the op library likes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.interfaces import Activation, OpTable, Quantization
from vllm_di.components.quantized import QuantizedWeight


class NoQuantization(Quantization):
    """``ops.pack_linear`` once, then ``ops.linear``."""

    reuses = frozenset({"record", "capture"})

    def __init__(self, ops: OpTable) -> None:
        self._ops, self._fused = ops, "gated_linear" in ops.fusions

    def linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor]:
        assert isinstance(weight, Tensor)
        return self._product(self._ops.pack_linear(weight), bias, out_dtype)

    def _product(
        self, packed: Any, bias: Tensor | None, out_dtype: torch.dtype | None
    ) -> Callable[[Tensor], Tensor]:
        product = self._ops.linear

        def run(x: Tensor) -> Tensor:
            return product(x, packed, bias, out_dtype)

        return run

    def tied_linear(
        self, weight: Tensor | QuantizedWeight, dtype: torch.dtype, out_dtype: torch.dtype
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        assert isinstance(weight, Tensor)
        packed = self._ops.pack_linear(weight)
        product, embedding = self._product(packed, None, out_dtype), self._ops.embedding
        if packed is weight:  # it is the table as well
            return product, lambda token_ids: embedding(token_ids, weight)
        return product, self._ops.packed_embedding(packed, dtype)

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
