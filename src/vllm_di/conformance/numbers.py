"""When two tensors count as equal."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")
TOLERANCES = {
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 1e-3),
}
"""(relative, absolute): the figures of PyTorch's kernel tests."""
LONG = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Absolute tolerance, where many terms are summed: attention, long GEMMs."""
LEAST_COSINE = 0.999


def assert_close(actual: Tensor, expected: Tensor, *, long: bool = False) -> None:
    """``expected`` is fp32 on the host; the tolerance is that of ``actual``'s dtype. NaN equals
    NaN, an infinity itself. Raises AssertionError."""
    relative, absolute = TOLERANCES[actual.dtype]
    found = actual.detach().cpu().float()
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if long:
        absolute = LONG[actual.dtype]
        finite = found.isfinite() & expected.isfinite()
        a, b = found[finite].double(), expected[finite].double()
        if len(a) > 1 and float(b.norm()) > 0:
            cosine = float(torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-30))
            assert cosine >= LEAST_COSINE, f"cosine {cosine:.6f} with the reference"
    torch.testing.assert_close(found, expected, rtol=relative, atol=absolute, equal_nan=True)
