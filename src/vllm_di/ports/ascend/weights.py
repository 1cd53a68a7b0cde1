"""Weights in FRACTAL_NZ, the tiled format that the NPU's matrix unit reads without reordering."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_di.components.interfaces import Device, OpTable, Quantization
from vllm_di.components.quantized import QuantizedWeight
from vllm_di.ports.ascend.vendor import require

FRACTAL_NZ = 29


class NzWeights(Quantization):
    """Casts each linear weight once, after loading; torch-npu's products take either format.

    Weights of float32 or with a single row or column stay as they are: the format has no such form.
    So do those of products into another dtype (logits), which read the weight in slices.
    """

    def __init__(self, device: Device, ops: OpTable) -> None:
        require(device, "npu::npu_format_cast")
        self._ops, self._cast = ops, torch.ops.npu.npu_format_cast

    def linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor]:
        assert isinstance(weight, Tensor)
        packed, product = self._ops.pack_linear(weight), self._ops.linear
        if out_dtype is None and weight.dtype is not torch.float32 and min(weight.shape) > 1:
            packed = self._cast(packed, FRACTAL_NZ)

        def run(x: Tensor) -> Tensor:
            return product(x, packed, bias, out_dtype)

        return run
