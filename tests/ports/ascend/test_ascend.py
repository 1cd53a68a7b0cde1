"""platform=ascend: contract-tested. What is checked stands in the files ``*_checks.py``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.own_process import OwnProcess

SCHEMAS = OwnProcess("tests.ports.ascend.schema_checks")
SIMULATED = OwnProcess("tests.ports.ascend.simulated_checks")
GRAPHS = OwnProcess("tests.ports.ascend.graph_checks")


@pytest.mark.parametrize("name", SCHEMAS.names)
def test_calls_match_the_vendors_schemas(name: str) -> None:
    SCHEMAS.result(name)


@pytest.mark.parametrize("name", SIMULATED.names)
def test_simulated(name: str) -> None:
    SIMULATED.result(name)


@pytest.mark.parametrize("name", GRAPHS.names)
def test_graphs_on_a_recording_stand_in(name: str) -> None:
    GRAPHS.result(name)


def test_without_torch_npu_it_says_what_is_missing() -> None:
    command = [sys.executable, "-m", "vllm_di.cli", "complete", "platform=ascend", "model=tiny"]
    done = subprocess.run(
        [*command, "loader=dummy", "hello"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and not done.stdout
    for words in ("conf/device/ascend.yaml", "torch_npu is not installed", "install CANN"):
        assert words in done.stderr, done.stderr
