"""Weights from safetensors files: one, or many with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_di.components.interfaces import Loader, Model
from vllm_di.components.loader.progress import shown
from vllm_di.errors import CheckpointError

INDEX = "model.safetensors.index.json"


class SafetensorsLoader(Loader):
    """Reads each tensor once, straight from the mapped file."""

    def __init__(self, *, path: str | None, progress: bool) -> None:
        self._path, self._progress = path, progress

    def load(self, model: Model) -> None:
        if self._path is None:
            raise CheckpointError(
                "loader=safetensors has no files: set model.path to a folder, "
                "or take loader=dummy for random weights"
            )
        files = find_files(Path(self._path))
        fill(model, shown(read_files(files), self._progress), self._path)


def fill(model: Model, weights: Iterator[tuple[str, Any]], place: str) -> None:
    """``model.load_weights``, whose errors then name the place of the weights."""
    try:
        model.load_weights(weights)
    except CheckpointError as error:
        text = str(error)
        raise type(error)(text if text.startswith(place) else f"{place}: {text}") from None


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises CheckpointError for pickles, gaps and empty
    folders."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not an index of weights: {error}") from None
        files = [folder / str(name) for name in names]
        if outside := [f for f in files if f.parent != folder]:
            raise CheckpointError(f"{index}: names a file outside its folder: {outside[0].name}")
    else:
        files = sorted(folder.glob("*.safetensors"))
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: the index names files that are missing: {', '.join(absent)}"
        )
    if not files:
        pickles = [p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind)]
        hint = f" ({pickles[0]} is a pickle, which is never read)" if pickles else ""
        raise CheckpointError(f"{folder}: no *.safetensors file{hint}")
    return files


def read_files(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor. Raises CheckpointError naming the file that is damaged."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping: keys() is all it has
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged or truncated: {error}") from None
