"""Files that record what a suite found."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import msgspec

from vllm_di.errors import VllmDiError, one_line


class ReportError(VllmDiError):
    """A recorded report or a file of waivers cannot be read."""


class ReportFile(msgspec.Struct):
    """What is written to a file as JSON, and read from it."""

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ReportError that names the file."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise ReportError(f"{path}: {one_line(error)}") from error
