"""What a program keeps in ``program.cache_dir``: its steps as JAX exports them, and what XLA made
of them."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_di.cache import foreign_folder, obtain

log = logging.getLogger(__name__)

EXPORTED = "step.jax"
"""The file of an entry that ``jax.export`` reads back."""
CACHE = "jax.experimental.compilation_cache.compilation_cache"


class KeptSteps:
    """``steps/KEY``, an entry for each part of the step and each bucket: a start that finds it does
    not lower the step again, which takes longer than to read what XLA compiled. A key follows from
    the traced step, the shapes, the target and the versions alone, so that it is the same on every
    machine. The log says whether an entry was found.

    ``write`` puts further files into a new entry: (its folder, what was exported, lowered).
    """

    def __init__(
        self,
        jax: Any,
        cache_dir: str,
        key: str,
        *,
        backend: str,
        num_chips: int,
        write: Callable[[Path, Any, Any], None],
    ) -> None:
        self._jax, self._key, self._backend, self._chips = jax, key, backend, num_chips
        self._folder, self._write = Path(cache_dir).expanduser() / "steps", write

    def lowered(self, function: Any, part: str, donated: Sequence[int], args: Sequence[Any]) -> Any:
        """The jitted ``function`` for the shapes of ``args``, by way of its artifact."""
        entry = self._folder / self.key_of(part, args)
        lowered: Any = None

        def make(path: Path) -> None:
            nonlocal lowered
            exported = export(self._jax, self._backend, function, args)
            lowered = relowered(self._jax, exported, donated, args)
            path.mkdir()
            (path / EXPORTED).write_bytes(exported.serialize())
            self._write(path, exported, lowered)

        try:
            data = (obtain(entry, make) / EXPORTED).read_bytes()
            log.info("%s: %s", entry, "exported" if lowered else "found")
        except OSError as error:
            log.warning("program.cache_dir: %s: %s: nothing is kept there", self._folder, error)
            if lowered is None:
                exported = export(self._jax, self._backend, function, args)
                lowered = relowered(self._jax, exported, donated, args)
        if lowered is None:
            exported = self._jax.export.deserialize(bytearray(data))
            lowered = relowered(self._jax, exported, donated, args)
        return lowered

    def key_of(self, part: str, args: Sequence[Any]) -> str:
        """SHA-256, in hex, of the traced step's key, the part and the shapes and dtypes of its
        inputs, among them the number of blocks."""
        leaves, tree = self._jax.tree.flatten(tuple(args))
        facts = {
            "step": self._key,
            "part": part,
            "chips": self._chips,
            "inputs": [str(tree), *(f"{x.dtype}{list(x.shape)}" for x in leaves)],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def export(jax: Any, backend: str, function: Any, args: Sequence[Any]) -> Any:
    """The jitted ``function`` as StableHLO for the shapes of ``args``."""
    return jax.export.export(function, platforms=[backend])(*args)


def relowered(jax: Any, exported: Any, donated: Sequence[int], args: Sequence[Any]) -> Any:
    return jax.jit(exported.call, donate_argnums=tuple(donated)).lower(*args)


def sources_hash() -> str:
    """Of the code that lowers a step, in hex: another may make another program of the same one."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def kept_programs(jax: Any, cache_dir: str | None) -> Iterator[None]:
    """What is compiled in the block is looked for, and kept, in the folder ``xla`` of that one by
    JAX itself."""
    if cache_dir is None:
        yield
        return
    with foreign_folder(Path(cache_dir).expanduser() / "xla") as folder:
        options = {
            "jax_compilation_cache_dir": None if folder is None else str(folder),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        # JAX keeps the first folder's files open
        forget = importlib.import_module(CACHE).reset_cache
        for name, value in options.items():
            jax.config.update(name, value)
        forget()
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            forget()
