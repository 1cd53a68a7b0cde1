"""``ops=xpu_kernels``: calls of Intel's operators by the schemas in its wheel, their stand-ins on a
simulated device, and what is said where the package is absent."""

from __future__ import annotations

import re

import pytest
import torch
from tests.own_process import OwnProcess
from tests.ports.wheels import XPU_KERNELS

from vllm_di.components.interfaces import Placement
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import PortError
from vllm_di.ports.xpu.vendor import SCHEMAS

SIMULATED = OwnProcess("tests.ports.xpu.kernels_checks")


def test_the_ports_schemas_are_the_vendors() -> None:
    """As text, without the spaces that its sources break lines with."""
    data = XPU_KERNELS.read("vllm_xpu_kernels/_C.abi3.so")
    rows = [row.decode() for row in re.findall(rb"[ -~]{16,}", data)]
    theirs = {re.sub(r"\s+", "", row) for row in rows if re.match(r"\w+\(Tensor", row)}
    assert len(theirs) > 20
    for operator, schema in SCHEMAS.items():
        name = operator.partition("::")[2]
        assert re.sub(r"\s+", "", name + schema) in theirs, operator


@pytest.mark.parametrize("name", SIMULATED.names)
def test_simulated(name: str) -> None:
    SIMULATED.result(name)


@pytest.mark.parametrize("op", ["library", "rms_norm"])
def test_an_absent_package_is_named(op: str) -> None:
    choice = "ops=xpu_kernels" if op == "library" else f"ops.{op}=xpu_kernels"
    assembly = assemble(["platform=cpu", "model=tiny", "attention=sdpa", choice])
    with (
        pytest.raises(PortError, match=r"vllm_xpu_kernels is not installed; pip install vllm-xpu-"),
        opened(WorkerContainer, assembly, placement=Placement(), only=("ops",)),
    ):
        pass
    assert not hasattr(torch.ops._C, "fused_qk_norm_rope")
