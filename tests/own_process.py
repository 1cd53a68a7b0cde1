"""Checks that need a process of their own: torch gives a simulated device one name in a process.

A module ``*_checks.py`` holds functions ``check_*``. One process runs all of them and tells of
each; the test module beside it turns them into tests:

    CHECKS = OwnProcess("tests.components.device.simulated_checks")

    @pytest.mark.parametrize("name", CHECKS.names)
    def test_simulated(name: str) -> None:
        CHECKS.result(name)

``python -m tests.own_process MODULE [NAME ...]`` runs them by hand.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import traceback
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


class OwnProcess:
    """The checks of one module, run on first demand. Raises AssertionError for one that failed."""

    def __init__(self, module: str, timeout: float = 240) -> None:
        self._module, self._timeout = module, timeout
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        self.names = [name for name in functions if name.startswith("check_")]
        """Of the checks, read without importing them."""

    def result(self, name: str) -> None:
        reason = self._results.get(name, f"the process ended before it: {self._results['']}")
        if reason:
            pytest.fail(reason, pytrace=False)

    @cached_property
    def _results(self) -> dict[str, str]:
        """Check to traceback, empty where it passed; under the empty name how the process ended."""
        command = [sys.executable, "-W", "error", "-m", "tests.own_process", self._module]
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=self._timeout,
            )
            out, end = done.stdout, f"exit status {done.returncode}: {done.stderr[-2000:]}"
        except subprocess.TimeoutExpired as late:
            out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            end = f"no end after {self._timeout:g} s"
        lines = [json.loads(line) for line in out.splitlines() if line.startswith('["check_')]
        return dict(lines) | {"": end}


def main() -> None:
    module = importlib.import_module(sys.argv[1])
    for name in sys.argv[2:] or [n for n in vars(module) if n.startswith("check_")]:
        try:
            getattr(module, name)()
            reason = ""
        except Exception:
            reason = traceback.format_exc()
        sys.stdout.write(json.dumps([name, reason]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
