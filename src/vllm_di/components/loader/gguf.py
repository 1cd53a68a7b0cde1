"""Weights from a GGUF file: dequantised once to the model's dtype, cached, and read from the cache
after that."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_di.components.interfaces import Loader, Model
from vllm_di.components.loader.gguf_tensors import read_gguf
from vllm_di.components.loader.progress import shown
from vllm_di.components.loader.safetensors import fill, read_files
from vllm_di.errors import CheckpointError

log = logging.getLogger(__name__)

VERSION = 2
"""Of the conversion: raised when its result changes, so that no stale cache is read."""


class GgufLoader(Loader):
    """``path`` is the file, ``cache`` the folder that the conversion goes to; null converts at each
    start."""

    def __init__(self, *, path: str | None, cache: str | None, progress: bool) -> None:
        self._path, self._cache, self._progress = path, cache, progress

    def load(self, model: Model) -> None:
        if self._path is None:
            raise CheckpointError("loader=gguf has no file: set model.path to one")
        path = Path(self._path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        if model.takes_quantized:
            weights = read_gguf(path, model.dtype, keep=True)
        else:
            weights = self._weights(path, model.dtype)
        fill(model, shown(weights, self._progress), str(path))

    def _weights(self, path: Path, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
        if self._cache is None:
            return read_gguf(path, dtype)
        name = str(dtype).removeprefix("torch.")
        cached = Path(self._cache) / f"weights-{VERSION}-{name}.safetensors"
        if _is_whole(cached) or _write(path, cached, dtype):
            return read_files([cached])
        return read_gguf(path, dtype)


def _is_whole(cached: Path) -> bool:
    """False for a file that is absent, or shorter than its header says."""
    try:
        with safe_open(cached, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _write(path: Path, cached: Path, dtype: torch.dtype) -> bool:
    """Convert into the cache, by rename; False when the cache cannot be written."""
    log.info("converting %s once to %s", path.name, cached)
    tensors = dict(read_gguf(path, dtype))
    try:
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            save_file(tensors, Path(scratch) / cached.name)
            (Path(scratch) / cached.name).rename(cached)
    except OSError as error:
        log.warning("the cache %s cannot be written (%s): converting at each start", cached, error)
        return False
    return True
