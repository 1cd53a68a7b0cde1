"""A weight of each format is what the library that writes the format makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.models.library_vectors import DEQUANTISED, LIBRARIES
from tests.models.quantized_checkpoints import IN_FLOATS, KINDS
from torch import Tensor

from vllm_di.components.loader.formats import FORMATS, LEFT_OUT
from vllm_di.components.loader.scheme import read_scheme

FOLDER = Path(__file__).parent / "vectors"
CASES = [(library, kind) for library, (_, kinds) in LIBRARIES.items() for kind in kinds]


def off(found: Tensor, want: Tensor) -> float:
    """Largest difference, of the largest weight."""
    assert found.shape == want.shape
    return float((found - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("library", "kind"), CASES)
def test_a_weight_is_what_its_library_makes_of_it(library: str, kind: str) -> None:
    tensors = load_file(FOLDER / f"{library}.safetensors")
    parts = {n.removeprefix(f"{kind}."): t for n, t in tensors.items() if n.startswith(f"{kind}.")}
    want = parts.pop(DEQUANTISED)
    assert want.abs().max() > 0.01
    scheme = read_scheme({"quantization_config": KINDS[kind].config})
    assert scheme is not None
    form = FORMATS[scheme.format]
    assert set(form.needed(scheme)) <= set(parts) <= {*form.known(), *LEFT_OUT}
    weight = form.read(scheme, parts)
    assert off(weight.dequantize(torch.float32), want) < 1e-3
    if kind not in IN_FLOATS:
        assert off(weight.keep().dequantize(torch.float32), want) < 1e-3


def test_the_files_say_which_version_wrote_them() -> None:
    for library in LIBRARIES:
        with safe_open(FOLDER / f"{library}.safetensors", framework="pt") as file:
            metadata = file.metadata()
        assert metadata["library"] == library
        assert metadata["version"][0].isdigit()


def test_every_format_is_among_them() -> None:
    """FP8 in blocks beside ``weight_scale_inv`` is compared with transformers' own reading."""
    schemes = [read_scheme({"quantization_config": KINDS[kind].config}) for _, kind in CASES]
    assert {s.format for s in schemes if s is not None} == FORMATS.keys() - {"fp8_blocks"}
