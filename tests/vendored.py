"""Files of other projects that tests compare with: a source distribution, fetched once, pinned by
hash, read as an archive, never built or installed.

``python -m tests.vendored`` (``make vendor-llama-cpp``) fetches all of them into ``.vendor``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1] / ".vendor"


@dataclass(frozen=True)
class SourceDistribution:
    """One version of a project on the package index.

    ``sha256`` is that of the ``.tar.gz``. ``part`` is the folder inside it that tests read; the
    rest is not unpacked.
    """

    project: str
    version: str
    sha256: str
    part: str

    @property
    def archive(self) -> Path:
        return ROOT / f"{self.project.replace('-', '_')}-{self.version}.tar.gz"

    def fetch(self) -> Path:
        """Download and unpack unless that is done. Raises OSError or ValueError."""
        if not self.archive.is_file():
            self._download()
        _check(self.archive, self.sha256)
        if not self._unpacked.is_dir():
            self._unpack()
        return self._unpacked / self.part

    def folder(self) -> Path:
        """The unpacked ``part``. Raises FileNotFoundError that says how to fetch it."""
        if not self.archive.is_file() or not self._unpacked.is_dir():
            raise FileNotFoundError(f"{self._unpacked} is missing: make vendor-llama-cpp")
        _check(self.archive, self.sha256)
        return self._unpacked / self.part

    @property
    def _unpacked(self) -> Path:
        """Named after the hash, so that files of another pin are never read."""
        return ROOT / f"{self.project}-{self.version}-{self.sha256[:12]}"

    def _download(self) -> None:
        """Through pip's own finder, which knows the configured indexes and certificates. ``pip
        download`` itself would build the project's metadata."""
        from pip._internal.commands import create_command

        ROOT.mkdir(exist_ok=True)
        command: Any = create_command("download")
        options, _ = command.parse_args(["--no-deps", "--no-binary=:all:"])
        with command.main_context():
            session = command.get_default_session(options)
            finder = command._build_package_finder(options, session)
            found = finder.find_all_candidates(self.project)
            link = next((c.link for c in found if str(c.version) == self.version), None)
            if link is None:
                raise FileNotFoundError(
                    f"no index has the sources of {self.project} {self.version}"
                )
            with session.get(link.url_without_fragment, stream=True) as response:
                response.raise_for_status()
                handle, name = tempfile.mkstemp(dir=ROOT)
                with os.fdopen(handle, "wb") as file:
                    for chunk in response.iter_content(2**20):
                        file.write(chunk)
        Path(name).replace(self.archive)

    def _unpack(self) -> None:
        top = f"{self.archive.name.removesuffix('.tar.gz')}/"
        made = Path(tempfile.mkdtemp(dir=ROOT))
        with tarfile.open(self.archive) as archive:
            for member in archive:
                inside = member.name.removeprefix(top)
                if member.isfile() and inside.startswith(f"{self.part}/"):
                    member.name = inside
                    archive.extract(member, made, filter="data")
        if not (made / self.part).is_dir():
            shutil.rmtree(made)
            raise ValueError(f"{self.archive} has no folder {self.part}")
        made.rename(self._unpacked)


LLAMA_CPP = SourceDistribution(
    project="llama-cpp-python",
    version="0.3.36",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    part="vendor/llama.cpp/models",
)
"""llama.cpp's ``templates/*.jinja`` and ``ggml-vocab-*.gguf`` with their ``.inp`` and ``.out``."""


@cache
def _check(archive: Path, sha256: str) -> None:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != sha256:
        archive.unlink()
        raise ValueError(f"{archive.name}: sha256 {digest}, expected {sha256}; it was removed")


if __name__ == "__main__":
    LLAMA_CPP.fetch()
