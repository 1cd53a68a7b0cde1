"""The ways to multiply that the CPU's kernels and torch have between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from vllm_di.components import products
from vllm_di.components.ops.cpu_paths import INPUTS, ONEDNN, OUTPUTS, ROWS, TILES, Candidate
from vllm_di.components.quantized import QuantizedWeight, by_channel, by_group

if TYPE_CHECKING:
    from vllm_di.components.ops.cpu import CpuOps


def candidates(ops: CpuOps) -> list[Candidate]:
    """Each multiplies a weight of its own dtype by the threads of ``ops``."""
    found = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for path, run in _plain(ops, dtype).items():
            found.append(Candidate(name, path, run))
    dense = _weight(torch.float32)
    for name, weight in (("int8", by_channel(dense)), ("int4", by_group(dense, 4))):
        for path, run in _quantized(ops, weight).items():
            found.append(Candidate(name, path, run))
    return found


def _plain(ops: CpuOps, dtype: torch.dtype) -> dict[str, Callable[[int], object]]:
    x, weight = torch.ones(ROWS[-1], INPUTS, dtype=dtype), _weight(dtype)
    packed = ops.pack_linear(weight)
    found: dict[str, Callable[[int], object]] = {
        ops.isa: lambda rows: ops.multiply(x[:rows], packed, tiled=False)
    }
    if ops.has_tiles and dtype is torch.bfloat16:
        found[TILES] = lambda rows: ops.multiply(x[:rows], packed, tiled=True)
    found[ONEDNN] = lambda rows: products.linear(x[:rows], weight)
    return found


def _quantized(ops: CpuOps, weight: QuantizedWeight) -> dict[str, Callable[[int], object]]:
    x, packed = torch.ones(ROWS[-1], INPUTS, dtype=torch.bfloat16), ops.pack_quantized(weight)
    found: dict[str, Callable[[int], object]] = {
        ops.isa: lambda rows: ops.multiply(x[:rows], packed, tiled=False)
    }
    if ops.has_tiles:
        found[TILES] = lambda rows: ops.multiply(x[:rows], packed, tiled=True)
    return found


def _weight(dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(-1, 1, OUTPUTS * INPUTS, dtype=torch.float32).view(OUTPUTS, -1).to(dtype)
