"""The step as StableHLO, kept for neuronx-cc, and what is compiled from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_di.ports.tpu.kept import export, relowered
from vllm_di.ports.tpu.program import TpuProgram

STABLEHLO, HLO = "step.stablehlo.mlir", "step.hlo.pb"
"""Files of an entry, beside what JAX reads back: the same as text, and the HloModule proto that
``neuronx-cc compile --framework XLA`` takes."""


class NeuronProgram(TpuProgram):
    """As TpuProgram, always by way of an artifact: each part of the step is exported for each
    bucket, and what is executed is compiled from what was exported."""

    option = "neuron"

    def lowered_for(self, function: Any, args: Sequence[Any]) -> Any:
        if self._kept is not None:
            return super().lowered_for(function, args)
        exported = export(self._jax, self._device.backend, function, args)
        return relowered(self._jax, exported, [1] if function is self._step else [], args)

    def write(self, entry: Path, exported: Any, lowered: Any) -> None:
        (entry / STABLEHLO).write_text(exported.mlir_module())
        hlo = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
        (entry / HLO).write_bytes(hlo)

    def close(self) -> None:
        super().close()
        self._jax.clear_caches()  # of what was exported JAX keeps more than its functions' own
