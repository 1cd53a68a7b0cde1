"""The op table: each op from the library that was chosen, fusion never against a choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.components.ops.libraries import ISAS, library, random

from vllm_di.components.interfaces import Activation, OpTable
from vllm_di.components.ops.cpu import CpuOps
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.errors import ConfigError


class Noting(TorchOps):
    """Another library, that notes what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.closed = 0

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        self.calls.append("rms_norm")
        return super().rms_norm(x, weight, eps)

    def close(self) -> None:
        self.closed += 1


class Partial(TorchOps):
    implements = frozenset({"rms_norm"})

    def describe(self) -> dict[str, str]:
        return {op: "vendor" if op in self.implements else "no licence" for op in self.OPS}


def test_auto_is_the_library_where_it_implements_the_op() -> None:
    table = SelectedOps(Partial())
    rows = table.describe()
    assert rows["rms_norm"] == "vendor"
    assert rows["linear"] == "torch (no licence)"
    assert rows["add_rms_norm"].startswith("unfused: rms_norm")


def test_each_op_can_be_chosen_alone() -> None:
    for op in OpTable.OPS:
        main, other = library(ISAS[0]), TorchOps()
        table = SelectedOps(main, **{op: other})
        assert table.library_of(op) is other
        assert table.describe()[op].startswith("torch")


@pytest.mark.parametrize("fused", sorted({*OpTable.OPS.fused} & CpuOps.methods))
def test_a_fused_op_is_taken_apart_when_a_member_is_chosen(fused: str) -> None:
    for member in OpTable.OPS.fused[fused]:
        table = SelectedOps(library(ISAS[0]), **{member: Noting()})
        assert fused not in table.fusions
        assert fused in SelectedOps(library(ISAS[0])).fusions


def test_a_norm_of_another_library_runs_in_place_of_the_fused_one() -> None:
    noting = Noting()
    table = SelectedOps(library(ISAS[0]), rms_norm=noting)
    x, residual, weight = random(3, 8), random(3, 8, seed=1), random(8)
    out, total = table.add_rms_norm(x, residual, weight, 1e-5)
    assert noting.calls == ["rms_norm"]
    want = TorchOps().add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close((out, total), want)


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_a_product_of_another_library_is_gated_apart(gate: Activation) -> None:
    table = SelectedOps(library(ISAS[0]), linear=TorchOps())
    x, weight = random(3, 32), random(64, 32)
    assert table.pack_gated_linear(weight) is weight
    ops: OpTable = table
    torch.testing.assert_close(
        ops.gated_linear(x, weight, None, gate), TorchOps().gated_linear(x, weight, None, gate)
    )


def test_a_fused_op_that_was_chosen_itself_stays() -> None:
    chosen = TorchOps()
    table = SelectedOps(library(ISAS[0]), add_rms_norm=chosen, rms_norm=Noting())
    assert table.add_rms_norm.__self__ is chosen  # type: ignore[attr-defined]


def test_a_library_that_lacks_a_chosen_op_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"ops\.linear: Partial does not.*no licence.*rms_norm"):
        SelectedOps(TorchOps(), linear=Partial())


def test_weights_are_packed_by_the_library_that_multiplies() -> None:
    weight = random(4, 8)
    assert SelectedOps(library(ISAS[0]), linear=TorchOps()).pack_linear(weight) is weight
    assert SelectedOps(library(ISAS[0])).pack_linear(weight) is not weight


def test_every_library_is_closed_once() -> None:
    noting = Noting()
    SelectedOps(noting, rms_norm=noting, linear=noting).close()
    assert noting.closed == 1
