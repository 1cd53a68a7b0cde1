"""Weights from safetensors files: one, or many with an index."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_di.components.interfaces import Loader, Model
from vllm_di.components.loader.progress import shown
from vllm_di.components.loader.quantized_files import QuantizedFiles
from vllm_di.components.loader.scheme import read_scheme
from vllm_di.errors import CheckpointError

log = logging.getLogger(__name__)

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(?P<name>.+)-(?P<n>\d+)-of-(?P<of>\d+)\.safetensors")


class SafetensorsLoader(Loader):
    """Reads each tensor once, straight from the mapped file.

    Weights that ``quantization_config`` of the folder's config.json says are quantised stay so
    where the model takes them; with ``dequantize`` the others become the model's dtype, else they
    are refused.
    """

    def __init__(self, *, path: str | None, progress: bool, dequantize: bool = False) -> None:
        self._path, self._progress, self._dequantize = path, progress, dequantize

    def load(self, model: Model) -> None:
        if self._path is None:
            raise CheckpointError(
                "loader=safetensors has no files: set model.path to a folder, "
                "or take loader=dummy for random weights"
            )
        weights = self._weights(Path(self._path), model)
        fill(model, shown(weights, self._progress), self._path)

    def _weights(self, folder: Path, model: Model) -> Iterator[tuple[str, Any]]:
        files = find_files(folder)
        scheme = read_scheme(_config(folder))
        if scheme is None:
            return read_files(files)
        if not (model.takes_quantized or self._dequantize):
            keeps = (
                "no kernel here multiplies small floats"
                if scheme.is_float
                else (
                    "quantization=checkpoint keeps them in a native model, where the platform has "
                    "kernels for them"
                )
            )
            raise CheckpointError(
                f"{folder}: its weights are quantized ({scheme}), and this model with this "
                "quantization takes floats alone: loader.dequantize=true makes them floats of the "
                f"model's dtype, which quantization=int8 rounds anew; {keeps}"
            )
        quantized = QuantizedFiles(
            scheme,
            files,
            dtype=model.dtype,
            keeps=model.keeps_quantized,
            takes_order=model.takes_order,
            may_dequantize=self._dequantize,
        )
        return quantized.read()


def _config(folder: Path) -> dict[str, Any]:
    """config.json; empty where the weights lie without one. The assembly has read it before: what
    is wrong with it is an error by then."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def fill(model: Model, weights: Iterator[tuple[str, Any]], place: str) -> None:
    """``model.load_weights``, whose errors then name the place of the weights. A tensor that comes
    twice is one."""
    try:
        model.load_weights(_once(weights))
    except CheckpointError as error:
        text = str(error)
        raise type(error)(text if text.startswith(place) else f"{place}: {text}") from None


def _once(weights: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen:
            raise CheckpointError(f"tensor {name} comes twice")
        seen.add(name)
        yield name, tensor


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's model: those that its index names; without one
    model.safetensors alone, or the only file, or one whole set of shards. What is left out is said
    in the log.

    Raises CheckpointError for pickles, gaps, empty folders, and where several files could be it.
    """
    found = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        files = _indexed(folder)
        if folder / WHOLE in found and folder / WHOLE not in files:
            raise CheckpointError(
                f"{folder}: {WHOLE} and {INDEX}, which names other files, are both there: "
                "which is the model? Move one of them elsewhere"
            )
    elif folder / WHOLE in found:
        files = [folder / WHOLE]
    else:
        files = _only_set(folder, found)
    if left := [f.name for f in found if f not in files]:
        log.warning("%s: not read, as none of the model: %s", folder, ", ".join(left))
    return files


def _indexed(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map must name a file for each tensor")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{index}: not an index of weights: {error}") from None
    files = [folder / name for name in names]
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index}: names a file outside its folder: {outside[0]!r}")
    if absent := [f.name for f in files if not f.is_file()]:
        raise CheckpointError(
            f"{folder}: the index names files that are missing: {', '.join(absent)}"
        )
    return files


def _only_set(folder: Path, found: list[Path]) -> list[Path]:
    """The one file, or the one whole set of shards, where no name says which is the model."""
    if not found:
        pickles = [p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind)]
        hint = f" ({pickles[0]} is a pickle, which is never read)" if pickles else ""
        raise CheckpointError(f"{folder}: no *.safetensors file{hint}")
    shards = [SHARD.fullmatch(f.name) for f in found]
    if len(found) == 1 and not shards[0]:
        return found
    sets = {(s["name"], s["of"]) if s else None for s in shards}
    first = shards[0]
    if len(sets) > 1 or first is None:
        raise CheckpointError(
            f"{folder}: no {INDEX} and no {WHOLE}, but several files: "
            f"{', '.join(f.name for f in found)}; name the model's {WHOLE}"
        )
    count, present = int(first["of"]), {int(s["n"]) for s in shards if s}
    if absent := sorted(set(range(1, min(count, 10_000) + 1)) - present):
        raise CheckpointError(
            f"{folder}: no {INDEX}, and of {count} shards {len(absent)} are missing, "
            f"the first of them number {absent[0]}"
        )
    return found


def read_files(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor. Raises CheckpointError naming the file that is damaged, or
    the two that hold one tensor."""
    owners: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping: keys() is all it has
                    if (owner := owners.setdefault(name, file)) is not file:
                        raise CheckpointError(
                            f"{file}: tensor {name} comes twice: it is in {owner.name} too"
                        )
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file}: damaged or truncated: {error}") from None
