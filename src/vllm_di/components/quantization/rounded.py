"""Weights rounded to 8 or 4 bits when they are loaded; activations become bytes on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vllm_di.components.interfaces import Activation, ExpertsFunction, OpTable, Quantization
from vllm_di.components.quantization.experts import QuantizedExperts
from vllm_di.components.quantization.products import QuantizedProducts
from vllm_di.components.quantized import GROUP, QuantizedWeight, by_channel, by_group
from vllm_di.errors import ConfigError


class RoundedWeights(Quantization):
    """``scales=channel``: one scale an output, 8 bits. ``scales=group``: scale and offset for 32
    weights. All linear weights, experts and the head; embeddings stay as they are."""

    reuses = frozenset({"record", "capture"})

    def __init__(
        self, ops: OpTable, *, bits: Literal[4, 8], scales: Literal["channel", "group"]
    ) -> None:
        if scales == "channel" and bits != 8:
            raise ConfigError(f"scales=channel has 8 bits, not {bits}; scales=group has either")
        self._bits, self._scales = bits, scales
        self._products, self._experts = QuantizedProducts(ops), QuantizedExperts(ops)
        self.experts_ask_host = self._experts.asks_host

    def linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor]:
        return self._products.linear(self._rounded(weight), bias, out_dtype)

    def gated_linear(
        self, weight: Tensor | QuantizedWeight, bias: Tensor | None, activation: Activation
    ) -> Callable[[Tensor], Tensor] | None:
        return self._products.gated_linear(self._rounded(weight), bias, activation)

    def experts(
        self,
        gate_up: Sequence[Tensor | QuantizedWeight],
        down: Sequence[Tensor | QuantizedWeight],
        activation: Activation,
    ) -> ExpertsFunction | None:
        inner, outer = map(self._rounded, gate_up), map(self._rounded, down)
        return self._experts.function(inner, outer, activation)

    def _rounded(self, weight: Tensor | QuantizedWeight) -> QuantizedWeight:
        if isinstance(weight, QuantizedWeight):
            return weight
        if self._scales == "channel":
            return by_channel(weight)
        try:
            return by_group(weight, self._bits)
        except ValueError as error:
            raise ConfigError(f"by groups of {GROUP}: {error}", key="quantization") from None

    def num_bytes(self, weight: Tensor | QuantizedWeight) -> int:
        if isinstance(weight, QuantizedWeight):
            return weight.nbytes
        outputs, inputs = weight.shape
        scales = 4 * outputs if self._scales == "channel" else 4 * weight.numel() // GROUP
        return outputs * inputs * self._bits // 8 + scales
