"""The products of ``ops=cpu``: GEMMs with plain and quantized weights, with gates, and experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_di.components import products
from vllm_di.components.interfaces import Activation, OpLibrary
from vllm_di.components.ops.cpu_packing import (
    TYPES,
    PackedBytes,
    PackedWeight,
    pack_linear,
    pack_quantized,
)
from vllm_di.components.ops.cpu_paths import Measured
from vllm_di.components.quantized import QuantizedWeight
from vllm_di.kernels.bindings import CpuKernels

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
NO_GATE = 0
GATES: dict[Activation, int] = {"silu": 1, "gelu_tanh": 2}
"""Numbers of the gates in the C++ interface."""
PRODUCTS = {
    "linear": ("bf16", "fp32"),
    "gated_linear": ("bf16", "fp32"),
    "quantized_linear": ("int8", "int4"),
    "gated_quantized_linear": ("int8", "int4"),
}
"""Ops to the kinds of weights that are measured of them; int4 stands for all groups."""
TILED = ("bf16", "int8", "int4")
"""Those of them that tile registers multiply."""
UNMEASURED = "the ways to multiply will be measured at the first start"


class CpuProducts(OpLibrary):
    """What ``CpuOps`` multiplies with; that class binds the kernels and chooses the paths."""

    kernels: CpuKernels
    threads: int
    has_tiles: bool
    _reference: OpLibrary
    _empty: Allocate
    _measured: Measured | None
    _rows_for_onednn: int | None
    _rows_for_tiles: dict[str, int | None]

    def paths(self, dtypes: Sequence[str]) -> list[str]:
        """What is said of the ways to multiply kinds of weights."""
        found = self._measured
        least = {kind: self._rows_for_tiles.get(kind) for kind in dtypes if kind in TILED}
        notes = []
        if found is None and None in least.values():
            notes.append(UNMEASURED)
        elif self.has_tiles:
            notes += [
                f"{kind} from {few} rows on by tiles" if few else f"{kind}: tiles are slower"
                for kind, few in least.items()
            ]
        return notes if found is None else [*notes, found.describe(dtypes)]

    def pack_linear(self, weight: Tensor) -> Any:
        plain = self._rows_for_onednn is not None
        return pack_linear(self.kernels, weight, self.threads, plain=plain, gated=False)

    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if not isinstance(weight, PackedWeight):
            return self._reference.linear(x, weight, bias, out_dtype)
        dtype = out_dtype or x.dtype
        if weight.plain is not None and len(x) >= (self._rows_for_onednn or 0) and dtype is x.dtype:
            return products.linear(x, weight.plain, bias)
        return self._product(x, weight, bias, dtype, NO_GATE, self._tiled("bf16", x))

    def multiply(self, x: Tensor, weight: PackedWeight | PackedBytes, *, tiled: bool) -> Tensor:
        """A product by the path that is named: by tile registers, which the library has, or not."""
        if isinstance(weight, PackedBytes):
            return self._quantized_product(x, weight, None, x.dtype, NO_GATE, tiled)
        return self._product(x, weight, None, x.dtype, NO_GATE, tiled)

    def _tiled(self, kind: str, x: Tensor) -> bool:
        least = self._rows_for_tiles[kind]
        return self.has_tiles and least is not None and len(x) >= least

    def pack_gated_linear(self, weight: Tensor) -> Any:
        plain = self._rows_for_onednn is not None
        return pack_linear(self.kernels, weight, self.threads, plain=plain, gated=not plain)

    def gated_linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        if not (isinstance(weight, PackedWeight) and weight.gated):
            return self._act(self.linear(x, weight, bias), activation)
        return self._product(x, weight, bias, x.dtype, GATES[activation], self._tiled("bf16", x))

    def _act(self, x: Tensor, activation: Activation) -> Tensor:
        return self.silu_and_mul(x) if activation == "silu" else self.gelu_tanh_and_mul(x)

    def _product(
        self,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        gate: int,
        tiled: bool,
    ) -> Tensor:
        if x.dtype is not weight.dtype:
            x = x.to(weight.dtype)
        stride, step = x.stride()
        if step != 1 or stride % 2:  # pairs of bf16 start at even elements
            x, stride = x.contiguous(), weight.inputs
        if bias is not None and bias.dtype not in TYPES:
            bias = bias.float()
        outputs = weight.outputs // 2 if gate else weight.outputs
        out = self._empty((len(x), outputs), dtype if dtype in TYPES else torch.float32)
        self.kernels.linear(
            TYPES[weight.dtype],
            x.data_ptr(),
            weight.data.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            0 if bias is None else TYPES[bias.dtype],
            len(x),
            outputs,
            weight.inputs,
            stride,
            TYPES[out.dtype],
            gate,
            tiled,
            self.threads,
        )
        return out if out.dtype is dtype else out.to(dtype)

    def pack_quantized(self, weight: QuantizedWeight) -> Any:
        return pack_quantized(self.kernels, weight, self.threads, gated=False)

    def quantized_linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if not isinstance(weight, PackedBytes):
            return self._reference.quantized_linear(x, weight, bias, out_dtype)
        tiled = self._tiled("int4" if weight.bits else "int8", x)
        return self._quantized_product(x, weight, bias, out_dtype or x.dtype, NO_GATE, tiled)

    def pack_gated_quantized(self, weight: QuantizedWeight) -> Any:
        return pack_quantized(self.kernels, weight, self.threads, gated=True)

    def gated_quantized_linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        if not (isinstance(weight, PackedBytes) and weight.gated):
            return self._act(self.quantized_linear(x, weight, bias), activation)
        tiled = self._tiled("int4" if weight.bits else "int8", x)
        return self._quantized_product(x, weight, bias, x.dtype, GATES[activation], tiled)

    def _quantized_product(
        self,
        x: Tensor,
        weight: PackedBytes,
        bias: Tensor | None,
        dtype: torch.dtype,
        gate: int,
        tiled: bool,
    ) -> Tensor:
        if x.dtype not in TYPES or x.stride()[1] != 1:
            x = x.float().contiguous()
        if bias is not None and bias.dtype not in TYPES:
            bias = bias.float()
        outputs = weight.outputs // 2 if gate else weight.outputs
        out = self._empty((len(x), outputs), dtype if dtype in TYPES else torch.float32)
        self.kernels.quantized_linear(
            TYPES[x.dtype],
            weight.bits,
            x.data_ptr(),
            weight.data.data_ptr(),
            None if weight.scales is None else weight.scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            0 if bias is None else TYPES[bias.dtype],
            len(x),
            outputs,
            weight.inputs,
            x.stride()[0],
            TYPES[out.dtype],
            gate,
            tiled,
            self.threads,
        )
        return out if out.dtype is dtype else out.to(dtype)

    def fused_experts(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Activation,
    ) -> Tensor:
        """Reads the experts' weights as they are. A token with an id that is no expert is NaN."""
        if not (
            are_rows(x)
            and x.dtype is gate_up.dtype is down.dtype
            and gate_up.is_contiguous()
            and down.is_contiguous()
        ):
            return self._reference.fused_experts(
                x, gate_up, down, topk_weights, topk_ids, activation
            )
        shares, ids = topk_weights.float().contiguous(), topk_ids.long().contiguous()
        experts, hidden, inter = down.shape
        out = self._empty(x.shape, x.dtype)
        self.kernels.fused_experts(
            TYPES[x.dtype],
            x.data_ptr(),
            gate_up.data_ptr(),
            down.data_ptr(),
            shares.data_ptr(),
            ids.data_ptr(),
            out.data_ptr(),
            len(x),
            hidden,
            inter,
            experts,
            ids.shape[1],
            x.stride()[0],
            (self._rows_for_tiles["bf16"] or 0) if self.has_tiles else 0,
            GATES[activation],
            self.threads,
        )
        return out


def are_rows(x: Tensor) -> bool:
    """Whether x is [rows, n] of a dtype that the kernels know, with contiguous rows."""
    return x.dim() == 2 and x.stride()[1] == 1 and x.dtype in TYPES
