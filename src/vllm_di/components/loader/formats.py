"""The formats of quantised linear layers: which tensors make one, and who reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_di.components.loader.packed import awq, gptq, packed
from vllm_di.components.loader.scaled import fp8, fp8_blocks, int8
from vllm_di.components.loader.scheme import Scheme
from vllm_di.components.quantized import QuantizedWeight


class Weight(Protocol):
    """One quantised weight [out, in], as a checkpoint has it."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out, in]"""

    def keep(self) -> QuantizedWeight:
        """In the form that kernels multiply. Raises ValueError saying why there is none."""


@dataclass(frozen=True, slots=True)
class Format:
    """Names are the last parts of tensors' names; the first of ``parts`` holds the weight."""

    read: Callable[[Scheme, Mapping[str, Tensor]], Weight]
    """Raises ValueError naming the tensor that does not fit."""
    parts: tuple[str, ...]
    """None of these may be missing."""
    optional: tuple[str, ...] = ()
    zero_point: str | None = None
    """Where the zero points are; a symmetric scheme may leave them out."""

    def needed(self, scheme: Scheme) -> tuple[str, ...]:
        if self.zero_point is None or scheme.symmetric:
            return self.parts
        return (*self.parts, self.zero_point)

    def known(self) -> tuple[str, ...]:
        return (*self.parts, *self.optional, *filter(None, [self.zero_point]))


FORMATS: dict[str, Format] = {
    "awq": Format(awq, ("qweight", "qzeros", "scales")),
    "gptq": Format(gptq, ("qweight", "qzeros", "scales"), ("g_idx",)),
    "fp8": Format(fp8, ("weight", "weight_scale")),
    "fp8_blocks": Format(fp8_blocks, ("weight", "weight_scale_inv")),
    "int8": Format(int8, ("weight", "weight_scale"), zero_point="weight_zero_point"),
    "packed": Format(
        packed,
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight_g_idx",),
        "weight_zero_point",
    ),
}
LEFT_OUT = (
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "k_scale",
    "v_scale",
    "kv_scale",
)
"""Of activations and of the KV cache, which have their own scales here or stay whole."""
