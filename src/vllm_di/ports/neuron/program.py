"""The step as StableHLO, kept for neuronx-cc, and what is compiled from it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_di import cache
from vllm_di.components.program.compile_cache import compile_key
from vllm_di.components.program.traced import TracedStep
from vllm_di.ports.tpu.program import TpuProgram, kept_programs

log = logging.getLogger(__name__)

EXPORTED, STABLEHLO, HLO = "step.jax", "step.stablehlo.mlir", "step.hlo.pb"
"""Files of an entry: what ``jax.export`` reads back, the same as text, and the HloModule proto that
``neuronx-cc compile --framework XLA`` takes."""


class NeuronProgram(TpuProgram):
    """As TpuProgram, by way of an artifact: each part of the step is exported for each bucket, and
    what is executed is compiled from what was exported.

    ``cache_dir`` has ``steps/KEY``, an entry for each part and bucket, and ``xla``, JAX's compiled
    programs. A key follows from the traced step, the shapes, the target and the versions alone, so
    that it is the same on every machine. The log says whether an entry was found.
    """

    option = "neuron"

    def lower(self, step: TracedStep) -> tuple[Any, Any]:
        self._key = compile_key(
            step,
            target=self._device.backend,
            versions={"jax": self._jax.__version__, "jaxlib": version("jaxlib")},
            with_weights=False,
        )
        self._body, head = super().lower(step)
        return self._body, head

    def compile_for(self, function: Any, args: Sequence[Any]) -> Any:
        if self.cache_dir is None:
            return self.compiled_of(self._lowered(function, self._exported(function, args), args))
        folder = Path(self.cache_dir).expanduser()
        entry = folder / "steps" / self.key_of(function, args)
        lowered: Any = None

        def make(path: Path) -> None:
            nonlocal lowered
            exported = self._exported(function, args)
            lowered = self._lowered(function, exported, args)
            path.mkdir()
            (path / EXPORTED).write_bytes(exported.serialize())
            (path / STABLEHLO).write_text(exported.mlir_module())
            hlo = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
            (path / HLO).write_bytes(hlo)

        try:
            data = (cache.obtain(entry, make) / EXPORTED).read_bytes()
            log.info("%s: %s", entry, "exported" if lowered else "found")
        except OSError as error:
            log.warning("program.cache_dir: %s: nothing is kept in it", error)
            lowered = lowered or self._lowered(function, self._exported(function, args), args)
        if lowered is None:
            exported = self._jax.export.deserialize(bytearray(data))
            lowered = self._lowered(function, exported, args)
        with kept_programs(self._jax, str(folder / "xla")):
            return self.compiled_of(lowered)

    def key_of(self, function: Any, args: Sequence[Any]) -> str:
        """SHA-256, in hex, of the traced step's key, the part and the shapes and dtypes of its
        inputs, among them the number of blocks."""
        leaves, tree = self._jax.tree.flatten(tuple(args))
        facts = {
            "step": self._key,
            "part": "step" if function is self._body else "head",
            "chips": len(self._device.chips),
            "inputs": [str(tree), *(f"{x.dtype}{list(x.shape)}" for x in leaves)],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _exported(self, function: Any, args: Sequence[Any]) -> Any:
        return self._jax.export.export(function, platforms=[self._device.backend])(*args)

    def _lowered(self, function: Any, exported: Any, args: Sequence[Any]) -> Any:
        donated = (1,) if function is self._body else ()
        return self._jax.jit(exported.call, donate_argnums=donated).lower(*args)

    def close(self) -> None:
        super().close()
        self._jax.clear_caches()  # of what was exported JAX keeps more than its functions' own
