"""Weights from a GGUF file: dequantised once to the model's dtype, cached, and read from the cache
after that."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_di.cache import obtain
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
        try:
            return read_files([obtain(cached, lambda to: _convert(path, to, dtype))])
        except OSError as error:
            log.warning("the cache %s cannot be used (%s): converting at each start", cached, error)
            return read_gguf(path, dtype)


def _convert(path: Path, to: Path, dtype: torch.dtype) -> None:
    """Raises OSError where the result cannot be written, or is not what was written."""
    log.info("converting %s once to %s", path.name, to.name)
    tensors = dict(read_gguf(path, dtype))
    try:
        save_file(tensors, to)
        with safe_open(to, framework="pt"):  # shorter than its header says: refused
            pass
    except SafetensorError as error:
        raise OSError(str(error)) from None
