"""The simulated device; the checks stand in simulated_checks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.own_process import OwnProcess

from vllm_di.kernels.build import BuildError
from vllm_di.kernels.simulated import build

CHECKS = OwnProcess("tests.components.device.simulated_checks")


@pytest.mark.parametrize("name", CHECKS.names)
def test_simulated(name: str) -> None:
    CHECKS.result(name)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="neither g\\+\\+ nor clang\\+\\+ is on the PATH"):
        build.load(tmp_path)


def test_a_failed_build_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    (tmp_path / "device.cpp").write_text("int main() { return nothing; }\n")
    with pytest.raises(BuildError, match="nothing"):
        build.load(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))
