"""Writes what the quantisation libraries themselves make of a weight in each of their formats.

    python -m tests.models.library_vectors tests/models/vectors

It needs compressed-tensors, gptqmodel and autoawq, which the tests do not: those read the files.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib import util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tests.models.quantized_checkpoints import KINDS, Kind, grid
from torch import Tensor

OUTPUTS, INPUTS = 16, 128
DEQUANTISED = "dequantised"


def by_gptqmodel(kind: Kind, made: Any) -> dict[str, Tensor]:
    from gptqmodel.utils.model_dequant import convert_gptq_file  # type: ignore[import-not-found]

    parts = kind.write(made, kind.bits)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        save_file({f"a.{part}": tensor for part, tensor in parts.items()}, file)
        weight = convert_gptq_file(file, torch.float32, kind.config, "cpu")["a.weight"]
    return parts | {DEQUANTISED: weight}


def by_autoawq(kind: Kind, made: Any) -> dict[str, Tensor]:
    """One file of it alone: the package asks for CUDA and older transformers."""
    found = util.find_spec("awq")
    assert found is not None
    assert found.submodule_search_locations
    path = Path(found.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    spec = util.spec_from_file_location("packing_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parts = kind.write(made, kind.bits)
    size = INPUTS if kind.group == -1 else kind.group
    arguments = (parts["qweight"], parts["qzeros"], parts["scales"].float())
    weight = module.dequantize_gemm(*arguments, kind.bits, size)
    return parts | {DEQUANTISED: weight.t().contiguous()}


def by_compressed_tensors(kind: Kind, made: Any) -> dict[str, Tensor]:
    """Packed and unpacked by the library."""
    from compressed_tensors.compressors import (  # type: ignore[import-not-found]
        BaseCompressor,
    )
    from compressed_tensors.quantization import (  # type: ignore[import-not-found]
        QuantizationScheme,
    )

    group = kind.config["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"])
    compressor = BaseCompressor.get_value_from_registry(kind.config["format"])
    ours = kind.write(made, kind.bits)
    given = {"weight": made.weight, "weight_scale": ours["weight_scale"].float()}
    if not kind.symmetric and kind.draw is None:
        points = torch.from_numpy(made.zero - 2 ** (kind.bits - 1))
        given["weight_zero_point"] = points.to(torch.int8)
    parts = compressor.compress(given, scheme)
    weight = compressor.decompress(parts, scheme)["weight"]
    return {name: t.contiguous() for name, t in parts.items()} | {DEQUANTISED: weight.float()}


LIBRARIES: dict[str, tuple[Callable[[Kind, Any], dict[str, Tensor]], tuple[str, ...]]] = {
    "autoawq": (by_autoawq, ("awq_16", "awq_32", "awq_64", "awq_row")),
    "gptqmodel": (by_gptqmodel, tuple(name for name in KINDS if name.startswith("gptq"))),
    "compressed-tensors": (
        by_compressed_tensors,
        (
            *("w4a16", "w4a16_asym", "w4a16_row", "w8a16", "w8a8", "w8a8_asym"),
            *("ct_fp8_rows", "ct_fp8_tensor", "ct_fp8_blocks"),
        ),
    ),
}


def main() -> None:
    folder = Path(sys.argv[1])
    for library, (run, kinds) in LIBRARIES.items():
        tensors: dict[str, Tensor] = {}
        rng = np.random.default_rng(11)
        for name in kinds:
            kind = KINDS[name]
            like = torch.from_numpy(rng.normal(0, 0.05, (OUTPUTS, INPUTS)))
            made = (kind.draw or grid)(rng, kind, like)
            tensors |= {f"{name}.{part}": t for part, t in run(kind, made).items()}
        metadata = {"library": library, "version": version(library)}
        save_file(tensors, folder / f"{library}.safetensors", metadata)


if __name__ == "__main__":
    main()
