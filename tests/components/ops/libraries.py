"""Op libraries for every instruction set of this machine, and how near they must come."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_di.components.device.host import HostDevice
from vllm_di.components.ops.cpu import CpuOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.kernels.isa import EMULATED, hindrance, usable_isas

ISAS = [*(isa for isa in usable_isas() if not hindrance(isa)), EMULATED]
REFERENCE = TorchOps()
DTYPES = [torch.float32, torch.bfloat16]


@functools.cache
def library(isa: str) -> CpuOps:
    """Where it has tile registers, every product in bf16 goes there: the rest is another isa's."""
    device = HostDevice(threads=2, memory_budget=None, default_dtype="float32")
    return CpuOps(
        device,
        isa=isa,  # type: ignore[arg-type]
        compile="require",
        cache=None,
        rows_for_onednn=None,
        rows_for_tiles=1,
    )


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def close(got: Tensor, exact: Tensor, scale: float = 1.0) -> None:
    """``exact`` is the reference in fp32 on the same inputs. The bound: 2e-5 in fp32, two roundings
    of 8 bits in bf16, of ``scale``, which is the size of what was summed."""
    bound = 2e-5 if got.dtype is torch.float32 else 2 * 2**-8
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    wrong = (got.float() - exact).abs() - bound * (exact.abs() + scale)
    assert wrong.numel() == 0 or float(wrong.max()) <= 0, float(wrong.max())


def noted_calls(monkeypatch: pytest.MonkeyPatch, ops: Iterable[str]) -> set[tuple[str, str]]:
    """(library, op) of every call of these ops from now on, ours or the reference's."""
    calls: set[tuple[str, str]] = set()

    def noted(cls: type, op: str) -> Any:
        plain = getattr(cls, op)

        def run(self: Any, *args: Any) -> Any:
            calls.add((cls.__name__, op))
            return plain(self, *args)

        return run

    for cls in (CpuOps, TorchOps):
        for op in ops:
            monkeypatch.setattr(cls, op, noted(cls, op))
    return calls
