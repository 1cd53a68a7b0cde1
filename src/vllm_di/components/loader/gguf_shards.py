"""A GGUF model that is split over several files: ``name-00001-of-00003.gguf`` and so on."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_di.errors import CheckpointError

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def shards_of(path: Path) -> list[Path]:
    """All files of the model that ``path`` belongs to, in order; itself where its name is not that
    of a shard. Raises CheckpointError naming one that is missing."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise CheckpointError(f"{path}: shard {int(match['number'])} of {count} cannot be")
    files: list[Path] = []
    for number in range(1, count + 1):
        file = path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        if not file.is_file():  # by the first, so that a great count costs nothing
            raise CheckpointError(f"{file}: no such file: shard {number} of {count} is missing")
        files.append(file)
    return files
