"""``--sanitize``: kernels with the address sanitizer (``make sanitize`` preloads its runtime)."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitize", action="store_true", help="kernels with address sanitizer")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sanitize"):
        from vllm_di.kernels import build

        build.COMMON_FLAGS = (
            *build.COMMON_FLAGS,
            "-O1",  # the last one counts: this compiles in a third of the time
            "-fsanitize=address",
            "-fno-omit-frame-pointer",
        )
