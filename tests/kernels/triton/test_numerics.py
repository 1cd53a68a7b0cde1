"""Runs ``interpreted.py`` in a process in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("interpreted.py")
ROOT = TESTS.parents[3]


def interpreted(marks: str) -> None:
    command = [sys.executable, "-m", "pytest", str(TESTS), "-m", marks, "--timeout=1500"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "100%" in done.stdout, done.stdout


def test_the_kernels_agree_with_the_reference() -> None:
    interpreted("not slow")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_kernels_agree_with_the_reference_everywhere() -> None:
    interpreted("slow")
