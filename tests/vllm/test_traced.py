"""The torch ops of compiled mode: fakes of the right shapes, and no input written to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_di.vllm.adapters import traced

RANKS = 2
X = torch.arange(24, dtype=torch.float32).view(4, 6)


def doubled(x: Tensor, *_: Any) -> Tensor:
    """In place, as an op of a table may be."""
    return x.mul_(2)


def halved(x: Tensor) -> Tensor:
    return x[..., : x.shape[-1] // 2] + 1


OPS = SimpleNamespace(
    rms_norm=lambda x, weight, eps: x * weight,
    add_rms_norm=lambda x, residual, weight, eps: (doubled(x), doubled(residual)),
    silu_and_mul=halved,
    gelu_tanh_and_mul=halved,
    rotary_embedding=lambda positions, q, k, *_: (doubled(q), doubled(k)),
)
GROUP = SimpleNamespace(reduce=doubled, gather=lambda x, dim: torch.cat([x] * RANKS, dim))
LAYERS: dict[str, tuple[Any, ...]] = {
    "rms_norm": (X, torch.ones(6), 1e-5),
    "add_rms_norm": (X, X.clone(), torch.ones(6), 1e-5),
    "silu_and_mul": (X,),
    "gelu_tanh_and_mul": (X,),
    "rotary_embedding": (torch.arange(4), X, X.clone(), torch.ones(4, 2), 2, False),
}


def check(op: Any, *arguments: Any) -> None:
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    for old, new in zip(before, arguments, strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new


@pytest.mark.parametrize("name", LAYERS)
def test_an_op_of_a_layer(name: str) -> None:
    ops = traced.torch_ops()
    ops.held["a test"] = OPS
    check(getattr(ops, name), "a test", *LAYERS[name])


def test_every_op_of_a_layer_is_checked() -> None:
    assert set(LAYERS) == set(vars(traced.torch_ops())) - {"held"}


def test_a_product() -> None:
    ops = traced.linear_op()
    ops.held["a test"] = lambda x: x.new_ones(4, 3)
    check(ops.linear, "a test", X, 3)


@pytest.mark.parametrize("x", [X, X.t()], ids=["whole", "transposed"])
def test_calls_of_a_group(x: Tensor) -> None:
    ops = traced.group_ops()
    ops.held["a test"] = GROUP
    check(ops.all_reduce, "a test", x)
    assert torch.equal(ops.all_reduce("a test", x), x * 2)
    for dim in (0, 1, -1):
        check(ops.all_gather, "a test", x, dim, RANKS)
