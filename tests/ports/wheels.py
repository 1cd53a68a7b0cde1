"""Vendors' wheels as a source of schemas: fetched once, read as a zip, never installed.

``python -m tests.ports.wheels`` (``make vendor-schemas``) fetches them.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

PYTHON = "3.11"
FOLDER = Path(__file__).resolve().parents[2] / ".vendor"


class Wheel(NamedTuple):
    """One file of the package index."""

    package: str
    version: str
    tags: str
    """Of Python, its ABI and the platform, as in the file's name."""
    sha256: str

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.package.replace('-', '_')}-{self.version}-{self.tags}.whl"

    def fetch(self) -> None:
        """Download it unless it is there. Raises CalledProcessError or ValueError."""
        if not self.path.is_file():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            for platform in self.tags.rpartition("-")[2].split("."):
                command += ["--platform", platform]
            command += ["--python-version", PYTHON, "--only-binary=:all:", "--dest", str(FOLDER)]
            subprocess.run([*command, f"{self.package}=={self.version}"], check=True)
        _check(self)

    def read(self, member: str) -> bytes:
        """One file of the wheel. Raises FileNotFoundError that says how to fetch it."""
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is missing: make vendor-schemas fetches it")
        _check(self)
        with zipfile.ZipFile(self.path) as wheel:
            return wheel.read(member)


@cache
def _check(wheel: Wheel) -> None:
    with wheel.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        wheel.path.unlink()
        raise ValueError(
            f"{wheel.path.name}: sha256 {digest}, expected {wheel.sha256}; it was removed"
        )


TORCH_NPU = Wheel(
    "torch-npu",
    "2.13.0",
    "cp311-cp311-manylinux_2_28_x86_64",
    "0deb809cf447d3fce636ccfdc9c9f874950f1fe76f18f4aaab31e2d345f7dac0",
)
XPU_KERNELS = Wheel(
    "vllm-xpu-kernels",
    "0.1.16.2",
    "cp38-abi3-manylinux_2_28_x86_64",
    "86bfa26abbb605fab485236a386e6de07f76320177c456fa96e55c27502af17a",
)


def main() -> None:
    for wheel in (TORCH_NPU, XPU_KERNELS):
        wheel.fetch()


if __name__ == "__main__":
    main()
