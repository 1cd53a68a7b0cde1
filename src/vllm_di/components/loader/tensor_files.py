"""Several safetensors files as one mapping of names to tensors, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_di.errors import CheckpointError


class TensorFiles:
    """Open as long as the ``with`` block. Raises CheckpointError naming the file that is damaged,
    or the two that hold one tensor."""

    def __init__(self, files: list[Path]) -> None:
        self._files, self._stack = files, ExitStack()
        self._open: dict[Path, Any] = {}
        self._owners: dict[str, Path] = {}

    def __enter__(self) -> TensorFiles:
        with self._stack:
            for file in self._files:
                with _named(file):
                    self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
                for name in self._open[file].keys():  # noqa: SIM118 - no mapping
                    if (owner := self._owners.setdefault(name, file)) is not file:
                        raise CheckpointError(
                            f"{file}: tensor {name} comes twice: it is in {owner.name} too"
                        )
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.clear()
        self._stack.close()

    @property
    def names(self) -> Iterator[str]:
        """File by file."""
        return iter(self._owners)

    def __contains__(self, name: str) -> bool:
        return name in self._owners

    def place(self, name: str) -> Path:
        """The file of a tensor that is there."""
        return self._owners[name]

    def dtype(self, name: str) -> str:
        """As safetensors names it (``BF16``), without reading the tensor."""
        file = self._owners[name]
        with _named(file):
            return str(self._open[file].get_slice(name).get_dtype())

    def get(self, name: str) -> Tensor:
        file = self._owners[name]
        with _named(file):
            tensor: Tensor = self._open[file].get_tensor(name)
            return tensor


@contextmanager
def _named(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: damaged or truncated: {error}") from None
