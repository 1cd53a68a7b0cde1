"""No quantization: weights stay in the model's dtype, packed as the op library likes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_di.components.interfaces import OpTable, Quantization
from vllm_di.components.quantized import QuantizedWeight


class NoQuantization(Quantization):
    """``ops.pack_linear`` once, then ``ops.linear``."""

    replayable = True

    def __init__(self, ops: OpTable) -> None:
        self._pack, self._linear = ops.pack_linear, ops.linear

    def linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor]:
        assert isinstance(weight, Tensor)
        packed, product = self._pack(weight), self._linear

        def run(x: Tensor) -> Tensor:
            return product(x, packed, bias, out_dtype)

        return run
