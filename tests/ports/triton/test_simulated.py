"""The platforms of the Triton kernels on simulated devices, whose names torch keeps for real ones.
``cuda`` and ``rocm`` share a device name, and all parts but the device's node."""

from __future__ import annotations

import pytest
from tests.own_process import OwnProcess

PROCESSES = {
    platform: OwnProcess(f"tests.ports.triton.simulated_{platform}_checks")
    for platform in ("rocm", "xpu")
}


@pytest.mark.parametrize(
    ("platform", "name"),
    [(platform, name) for platform, process in PROCESSES.items() for name in process.names],
)
def test_simulated(platform: str, name: str) -> None:
    PROCESSES[platform].result(name)
