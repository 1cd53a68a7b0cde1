"""Quantizations: near to the whole weights, and what a GGUF holds is what is multiplied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tests.components.ops.libraries import ISAS, library, random
from tests.models.checkpoints import make
from tests.models.gguf_files import write
from tests.models.runner import BLOCK, Running, attention, device

from vllm_di import LLM, SamplingParams
from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.interfaces import OpTable, Placement, Quantization
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.loader.gguf import GgufLoader
from vllm_di.components.loader.gguf_blocks import FLOATS
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.quantization.kept import KeptWeights
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.components.quantization.rounded import RoundedWeights
from vllm_di.components.quantized import by_channel
from vllm_di.errors import CheckpointError, ConfigError
from vllm_di.models.checkpoint import describe
from vllm_di.models.config import DecoderConfig
from vllm_di.models.decoder import Decoder
from vllm_di.models.hf_config import model_fields

SIZES = {"hidden_size": 96, "intermediate_size": 64}
TOKENS = [(5 * i * i + i) % 97 + 1 for i in range(30)]


def logits(
    file: Path, folder: Path, kind: Callable[[OpTable], Quantization], ops: OpTable
) -> torch.Tensor:
    on = device()
    layout = HndLayout(on, block_size=BLOCK, dtype="auto")
    backend = attention("sdpa", ops, layout)
    config = DecoderConfig(dtype="float32", **model_fields(describe(str(folder)).hf_config))
    quantization = kind(ops)
    model = Decoder(on, ops, backend, SingleCommunicator(Placement()), quantization, config=config)
    GgufLoader(path=str(file), cache=None, progress=False).load(model)
    return Running(model, backend, layout).feed(TOKENS)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("case", ["llama_gqa_tied", "phi3", "qwen3", "mixtral"])
def test_a_gguf_is_multiplied_as_it_is(case: str, kind: str, tmp_path: Path) -> None:
    make(case, tmp_path, **SIZES)
    file = write(tmp_path, tmp_path / "a.gguf", matrices=gguf.GGMLQuantizationType[kind])
    plain = SelectedOps(TorchOps())
    want = logits(file, tmp_path, NoQuantization, plain)
    size = float(want.abs().max())
    exact = logits(file, tmp_path, KeptWeights, plain)
    assert float((exact - want).abs().max()) < 1e-4 * size
    kernels = logits(file, tmp_path, KeptWeights, SelectedOps(library(ISAS[0])))
    error = (kernels - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 0 < float(error) < 0.2  # activations in 8 bits, of experts too, in a random model


@pytest.mark.parametrize("kind", [KeptWeights, NoQuantization])
def test_what_is_wrong_with_a_gguf_names_tensor_and_file(
    kind: Callable[[OpTable], Quantization], tmp_path: Path
) -> None:
    """Cut off, of an unknown type, of another shape: whether blocks are kept or dequantised."""
    make("llama_gqa_tied", tmp_path, **SIZES)
    whole = write(
        tmp_path, tmp_path / "whole.gguf", matrices=gguf.GGMLQuantizationType.Q4_1
    ).read_bytes()
    file = tmp_path / "a.gguf"

    def load(data: bytes | bytearray) -> None:
        file.write_bytes(data)
        logits(file, tmp_path, kind, SelectedOps(TorchOps()))

    for share in (0.6, 0.99):
        with pytest.raises(CheckpointError, match=r"a\.gguf: damaged or truncated: tensor blk\.\d"):
            load(whole[: int(len(whole) * share)])
    unknown = bytearray(whole)
    name = b"blk.1.ffn_down.weight"
    place = unknown.index(name) + len(name) + 4 + 2 * 8
    assert unknown[place] == gguf.GGMLQuantizationType.Q4_1
    unknown[place] = 200
    with pytest.raises(
        CheckpointError, match=r"a\.gguf: damaged .*tensor blk\.1\.ffn_down\.weight: .*200"
    ):
        load(unknown)
    make("llama_gqa_tied", tmp_path, **SIZES | {"intermediate_size": 96})  # the config alone
    with pytest.raises(CheckpointError, match=r"a\.gguf: tensor .*(down|gate|up)_proj.* shape"):
        load(whole)


def test_weights_in_floats_stay_so_under_gguf() -> None:
    assert "F32" in FLOATS
    ops, weight = SelectedOps(TorchOps()), random(8, 32)
    x = random(3, 32)
    got = KeptWeights(ops).linear(weight, None)(x)
    assert torch.equal(got, NoQuantization(ops).linear(weight, None)(x))


def test_rounded_weights() -> None:
    ops, weight, bias, x = SelectedOps(TorchOps()), random(40, 64), random(40), random(3, 64)
    want = x @ weight.T + bias
    for settings, bound in (
        ({"bits": 8, "scales": "channel"}, 0.02),
        ({"bits": 8, "scales": "group"}, 0.01),
        ({"bits": 4, "scales": "group"}, 0.2),
    ):
        rounded = RoundedWeights(ops, **settings)  # type: ignore[arg-type]
        got = rounded.linear(weight, bias)(x)
        assert 0 < float((got - want).abs().max()) < bound * float(want.abs().max())
        assert rounded.num_bytes(weight) < weight.nbytes / 3
        ready = by_channel(weight)
        assert rounded.num_bytes(ready) == ready.nbytes


def test_settings_that_make_no_sense() -> None:
    ops = SelectedOps(TorchOps())
    with pytest.raises(ConfigError, match="scales=channel has 8 bits, not 4"):
        RoundedWeights(ops, bits=4, scales="channel")
    with pytest.raises(ConfigError, match="33 inputs are no multiple of a group of 32"):
        RoundedWeights(ops, bits=4, scales="group").linear(random(4, 33), None)


@pytest.mark.parametrize("option", ["int8", "int4", "gguf"])
def test_as_an_option(option: str) -> None:
    """The whole engine, replayed steps and all: the same tokens with and without a cache hit."""
    overrides: list[Any] = ["platform=cpu", f"quantization={option}"]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM("tiny", overrides=overrides) as llm:
        first, second = (
            [o.outputs[0].token_ids for o in llm.generate(["hello" * 20, "you"], params)]
            for _ in range(2)
        )
        assert first == second
        assert [len(ids) for ids in first] == [12, 12]
