"""platform=hpu on a simulated device. What is checked stands in ``simulated_checks.py``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.own_process import OwnProcess

SIMULATED = OwnProcess("tests.ports.hpu.simulated_checks")


@pytest.mark.parametrize("name", SIMULATED.names)
def test_simulated(name: str) -> None:
    SIMULATED.result(name)


def test_without_habanas_package_it_says_what_is_missing() -> None:
    command = [sys.executable, "-m", "vllm_di.cli", "complete", "platform=hpu", "model=tiny"]
    done = subprocess.run(
        [*command, "loader=dummy", "hello"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and not done.stdout
    line = done.stderr.strip().splitlines()[-1]
    for words in ("conf/device/hpu.yaml", "habana_frameworks is not installed", "install Intel's"):
        assert words in line, done.stderr
