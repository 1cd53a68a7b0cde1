"""The torch-npu wheel as a source of schemas: fetched once, read as a zip, never installed.

``python -m tests.ports.ascend.wheel`` (``make vendor-schemas``) fetches it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

VERSION = "2.13.0"
NAME = f"torch_npu-{VERSION}-cp311-cp311-manylinux_2_28_x86_64.whl"
SHA256 = "0deb809cf447d3fce636ccfdc9c9f874950f1fe76f18f4aaab31e2d345f7dac0"
PATH = Path(__file__).resolve().parents[3] / ".vendor" / NAME


def fetch() -> None:
    """Download it unless it is there. Raises CalledProcessError or ValueError."""
    if not PATH.is_file():
        platform = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *platform]
        subprocess.run(
            [*command, "--only-binary=:all:", "--dest", str(PATH.parent), f"torch-npu=={VERSION}"],
            check=True,
        )
    _check()


def read(member: str) -> bytes:
    """One file of the wheel. Raises FileNotFoundError that says how to fetch it."""
    if not PATH.is_file():
        raise FileNotFoundError(f"{PATH} is missing: make vendor-schemas fetches it")
    _check()
    with zipfile.ZipFile(PATH) as wheel:
        return wheel.read(member)


@cache
def _check() -> None:
    digest = hashlib.sha256(PATH.read_bytes()).hexdigest()
    if digest != SHA256:
        PATH.unlink()
        raise ValueError(f"{NAME}: sha256 {digest}, expected {SHA256}; it was removed")


if __name__ == "__main__":
    fetch()
