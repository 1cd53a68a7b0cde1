"""Quantizations with a fault in the products that they make themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_di.components.quantization.none import NoQuantization
from vllm_di.components.quantized import QuantizedWeight


class BiasDropped(NoQuantization):
    """Its ops are right: whole models with biases alone show it."""

    def linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor]:
        return super().linear(weight, None, out_dtype)


class HalfQuantized(NoQuantization):
    """A port's own, under a name of its own: rounds every weight to its sign."""

    def linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor]:
        assert isinstance(weight, Tensor)
        return super().linear(weight.sign() * weight.abs().mean(), bias, out_dtype)


class UnchangedQuantized(NoQuantization):
    """A port's own that quantises nothing."""
