"""``--sanitize``: kernels with the address sanitizer (``make sanitize`` preloads its runtime).
``--aarch64``: kernels for another architecture, run by QEMU (``make test-aarch64``).
``--hypothesis-profile=explore``: other random inputs in each run."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("hypothesis") is not None:  # vLLM's environments have it not
    from hypothesis import settings

    # no deadline: an example takes long where the machine is busy
    settings.register_profile("steady", deadline=None, derandomize=True)
    settings.register_profile("explore", deadline=None)
    settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitize", action="store_true", help="kernels with address sanitizer")
    parser.addoption("--aarch64", action="store_true", help="kernels for aarch64, by QEMU")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sanitize"):
        from vllm_di.kernels import build

        build.COMMON_FLAGS = (
            *build.COMMON_FLAGS,
            "-O1",  # the last one counts: this compiles in a third of the time
            "-fsanitize=address",
            "-fno-omit-frame-pointer",
        )
    if config.getoption("--aarch64"):
        from tests.aarch64 import guest

        if lacking := guest.missing():
            raise pytest.UsageError(
                f"--aarch64: {' and '.join(lacking)} not found; on Debian: "
                f"apt-get install {guest.PACKAGES}"
            )
        session = guest.Session()
        session.start()
        config.add_cleanup(session.stop)
        config.stash[guest.SESSION] = session
