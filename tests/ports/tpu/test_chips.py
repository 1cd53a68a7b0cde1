"""Several chips, in a process that has them."""

from __future__ import annotations

import pytest
from tests.own_process import OwnProcess

pytest.importorskip("jax", reason="platform=tpu was not tested: pip install 'vllm-di[tpu]'")

CHECKS = OwnProcess("tests.ports.tpu.chips_checks")


@pytest.mark.parametrize("name", CHECKS.names)
def test_chips(name: str) -> None:
    CHECKS.result(name)
