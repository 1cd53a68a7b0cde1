"""Quantised safetensors: what they hold is what is multiplied, and what cannot be is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.components.ops.libraries import ISAS, library
from tests.models.quantized_checkpoints import IN_FLOATS, KINDS, quantize
from tests.models.ranks import on_ranks
from tests.models.runner import BLOCK, Running, attention, device

from vllm_di import LLM, SamplingParams
from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.interfaces import Communicator, OpTable, Placement
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.loader.safetensors import SafetensorsLoader
from vllm_di.components.ops.cpu_packing import PackedBytes
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.quantization.kept import KeptWeights
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.containers.assembly import assemble
from vllm_di.errors import CheckpointError, UnsupportedModelError
from vllm_di.models.checkpoint import describe
from vllm_di.models.config import DecoderConfig
from vllm_di.models.decoder import Decoder
from vllm_di.models.hf_config import model_fields

TOKENS = [(5 * i * i + i) % 97 + 1 for i in range(30)]
PLAIN = ["tokenizer=bytes", "tokenizer.vocab_size=300", "worker.num_blocks=64"]
KEPT = [kind for kind in KINDS if kind not in IN_FLOATS]


def load(
    folder: Path,
    *,
    table: OpTable | None = None,
    keep: bool = True,
    dequantize: bool = False,
    communicator: Communicator | None = None,
) -> Running:
    on = device()
    table = table or SelectedOps(TorchOps())
    layout = HndLayout(on, block_size=BLOCK, dtype="auto")
    backend = attention("sdpa", table, layout)
    config = DecoderConfig(dtype="float32", **model_fields(describe(str(folder)).hf_config))
    kind = KeptWeights if keep else NoQuantization
    ranks = communicator or SingleCommunicator(Placement())
    model = Decoder(on, table, backend, ranks, kind(table), config=config)
    SafetensorsLoader(path=str(folder), progress=False, dequantize=dequantize).load(model)
    return Running(model, backend, layout)


def wanted(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([TOKENS]), use_cache=False).logits[0]
    return found


def off(found: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, of the largest logit."""
    return float((found - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_it_equals_transformers(kind: str, tmp_path: Path) -> None:
    want = wanted(quantize("llama_gqa_tied", kind, tmp_path))
    for keep in (False, *([] if kind in KEPT else [True])):
        assert off(load(tmp_path, keep=keep, dequantize=True).feed(TOKENS), want) < 1e-4


@pytest.mark.parametrize("kind", KEPT)
def test_kept_it_equals_transformers(kind: str, tmp_path: Path) -> None:
    """On the reference, which leaves activations whole; the kernels round them to bytes."""
    want = wanted(quantize("llama_gqa_tied", kind, tmp_path))
    running = load(tmp_path)
    assert off(running.feed(TOKENS), want) < 1e-3
    kernels = load(tmp_path, table=SelectedOps(library(ISAS[0]))).feed(TOKENS)
    error = (kernels - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 0 < float(error) < 0.15


@pytest.mark.parametrize("kind", KEPT)
def test_kept_weights_use_the_packed_kernels(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight, in its bits: nothing falls back to the reference."""
    quantize("qwen2", kind, tmp_path)
    packed: list[Any] = []
    ops = library(ISAS[0])
    for name in ("pack_quantized", "pack_gated_quantized"):
        pack = getattr(ops, name)

        def spy(weight: Any, pack: Any = pack) -> Any:
            packed.append(pack(weight))
            return packed[-1]

        monkeypatch.setattr(ops, name, spy)
    load(tmp_path, table=SelectedOps(ops))
    assert len(packed) == 4 * 4  # qkv, o, gate and up, down
    by_row = kind == "gptq_8_sym_row"
    for weight in packed:
        assert isinstance(weight, PackedBytes)
        assert weight.bits == (0 if by_row else KINDS[kind].bits)


@pytest.mark.parametrize("case", ["phi3", "qwen3", "gemma3", "qwen2"])
def test_families(case: str, tmp_path: Path) -> None:
    want = wanted(quantize(case, "awq_32", tmp_path))
    assert off(load(tmp_path).feed(TOKENS), want) < 1e-3


@pytest.mark.parametrize("kind", ["awq_64", "gptq_8_sym_row"])
def test_two_ranks_equal_one(kind: str, tmp_path: Path) -> None:
    quantize("llama_gqa_tied", kind, tmp_path)
    want = load(tmp_path).feed(TOKENS)
    for found in on_ranks(2, lambda rank: load(tmp_path, communicator=rank).feed(TOKENS)):
        assert off(found, want) < 1e-4


def test_a_share_that_cuts_a_group_is_refused(tmp_path: Path) -> None:
    """A rank's 16 inputs are no whole group of 32, whatever the group of the checkpoint is."""
    for kind in ("awq_32", "gptq_8_sym_row"):
        quantize("llama_gqa_tied", kind, tmp_path, num_key_value_heads=4)
        with pytest.raises(CheckpointError, match=r"o_proj\.weight: inputs \d+ to \d+ cut a group"):
            on_ranks(4, lambda rank: load(tmp_path, communicator=rank))


@pytest.mark.parametrize("kind", IN_FLOATS)
def test_without_a_packed_form_it_is_refused_with_the_key(kind: str, tmp_path: Path) -> None:
    quantize("llama_gqa_tied", kind, tmp_path)
    words = (
        r"model\.safetensors: model\.layers\.0\.\S+\.weight is quantized \((awq|gptq), . bits, "
        r"groups of \d+\) and cannot stay so: .*loader\.dequantize=true"
    )
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path)


def test_a_part_in_floats_widens_its_product_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tools leave modules out by name: here one of the three that are one product."""
    name = "model.layers.1.self_attn.k_proj"
    plain = torch.zeros(32, 64)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rest = {k: v for k, v in tensors.items() if not k.startswith(f"{name}.")}
        return rest | {f"{name}.weight": plain}

    model = quantize("llama2", "awq_32", tmp_path, change, num_key_value_heads=2)
    model.model.layers[1].self_attn.k_proj.weight.data = plain
    assert off(load(tmp_path).feed(TOKENS), wanted(model)) < 1e-3
    assert "1 products have weights of which the checkpoint quantizes some" in caplog.text


def test_experts_are_refused_or_widened_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    want = wanted(quantize("mixtral", "gptq_4_sym", tmp_path))
    words = r"experts\.\d\.w\d\.weight is quantized .*floats alone; loader\.dequantize=true"
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path)
    with caplog.at_level(logging.INFO):
        assert off(load(tmp_path, dequantize=True).feed(TOKENS), want) < 1e-3
    assert "48 weights are dequantised to float32, as loader.dequantize=true" in caplog.text
    assert "16 weights stay as the checkpoint has them" in caplog.text  # attention's


def test_a_bias_of_zeros_that_the_model_lacks_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """AutoGPTQ writes one beside each weight; one that is not zero would be lost."""
    biases = {f"model.layers.{i}.mlp.up_proj.bias": torch.zeros(128) for i in range(4)}
    want = wanted(quantize("llama_gqa_tied", "gptq_4_sym", tmp_path, lambda t: t | biases))
    assert off(load(tmp_path).feed(TOKENS), want) < 1e-3
    assert "4 tensors are left out: model.layers.*.mlp.up_proj.bias (4)" in caplog.text
    biases["model.layers.2.mlp.up_proj.bias"][5] = 1.0
    quantize("llama_gqa_tied", "gptq_4_sym", tmp_path, lambda t: t | biases)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.bias is in the"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------
# the whole engine


def choice(folder: Path, *overrides: str) -> tuple[str, str]:
    """-> the option of the slot quantization, and why."""
    found = assemble([f"model.path={folder}", "model=local", *PLAIN, *overrides])
    chosen = found.choices["quantization"]
    return chosen.option, str(chosen.origin)


def test_the_assembly_chooses_and_says_why(tmp_path: Path) -> None:
    quantize("llama_gqa_tied", "awq_64", tmp_path)
    assert choice(tmp_path, "platform=cpu") == (
        "checkpoint",
        "auto: config.json: awq, 4 bits, groups of 64",
    )
    assert choice(tmp_path, "platform=cpu", "quantization=int8")[0] == "int8"
    assert choice(tmp_path, "platform=cpu", "model.implementation=transformers")[0] == "none"


@pytest.mark.parametrize("more", [[], ["quantization=int8", "loader.dequantize=true"]])
def test_it_generates(more: list[str], tmp_path: Path) -> None:
    quantize("llama_gqa_tied", "gptq_4_asym", tmp_path)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(str(tmp_path), overrides=["platform=cpu", *PLAIN, *more]) as llm:
        [output] = llm.generate(["abc"], params)
    assert len(output.outputs[0].token_ids) == 8


@pytest.mark.parametrize("more", ["quantization=none", "model.implementation=transformers"])
def test_floats_are_made_where_the_user_asks_alone(more: str, tmp_path: Path) -> None:
    quantize("llama_gqa_tied", "gptq_4_asym", tmp_path)
    overrides = ["platform=cpu", "model.dtype=float32", *PLAIN, more]
    with pytest.raises(
        CheckpointError, match=r"its weights are quantized .*loader\.dequantize=true"
    ):
        LLM(str(tmp_path), overrides=overrides)
    with LLM(str(tmp_path), overrides=[*overrides, "loader.dequantize=true"]) as llm:
        [output] = llm.generate(["abc"], SamplingParams(temperature=0, max_tokens=3))
    assert output.outputs[0].token_ids


# ------------------------------------------------------------------------------------------------
# what is wrong

SCHEMES: dict[str, tuple[dict[str, Any] | Any, str]] = {
    "no object": ("awq", "quantization_config of its config.json 'awq' is no object"),
    "no method": ({}, "quant_method of its config.json None is not supported"),
    "another method": ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported"),
    "a slip": ({"quant_method": "gtpq"}, "did you mean .gptq"),
    "bits": (
        {"bits": 3},
        r"quantization_config\.bits of its config.json 3 is not supported",
    ),
    "bits in words": ({"bits": "4"}, r"bits of its config.json '4' is not supported"),
    "no bits": ({"bits": None}, r"bits of its config.json is missing"),
    "no group": ({"group_size": None}, r"group_size of its config.json None: expected -1 or"),
    "group 0": ({"group_size": 0}, r"group_size of its config.json 0: expected -1 or"),
    "marlin": ({"checkpoint_format": "marlin"}, "'marlin' is not supported, gptq or gptq_v2 is"),
    "own bits": ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic of its config.json .* own"),
    "gemv": ({"quant_method": "awq", "version": "gemv"}, "version of its config.json 'gemv'"),
    "8 bits": ({"quant_method": "awq", "bits": 8}, "bits of its config.json 8 is not supported, 4"),
}


@pytest.mark.parametrize("what", SCHEMES)
def test_a_scheme_that_cannot_be_read_is_named(what: str, tmp_path: Path) -> None:
    change, words = SCHEMES[what]
    quantize("llama_gqa_tied", "gptq_4_sym", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    node = config["quantization_config"]
    if isinstance(change, dict):
        node = {k: v for k, v in (node | change).items() if v is not None} if change else {"a": 1}
    else:
        node = change
    path.write_text(json.dumps(config | {"quantization_config": node}))
    with pytest.raises(UnsupportedModelError, match=rf"{words}.*supported are awq .*gptq"):
        assemble(["model=local", f"model.path={tmp_path}"])


MODULE = "model.layers.1.mlp.down_proj"


def _without(part: str) -> Any:
    return lambda t: {k: v for k, v in t.items() if k != f"{MODULE}.{part}"}


def _with(part: str, change: Any) -> Any:
    return lambda t: t | {f"{MODULE}.{part}": change(t[f"{MODULE}.{part}"]).contiguous()}


WRONG: dict[str, tuple[str, Any, str]] = {
    **{
        f"{method} without {part}": (
            f"{method}_32" if method == "awq" else "gptq_4_sym",
            _without(part),
            rf"tensor {MODULE}\.{part} is missing beside .*{method}, 4 bits.*qzeros, scales",
        )
        for method in ("awq", "gptq")
        for part in ("qweight", "qzeros", "scales")
    },
    "scales of another shape": ("awq_32", _with("scales", lambda t: t[:-1]), "scales has shape"),
    "scales of integers": ("awq_32", _with("scales", lambda t: t.int()), "scales is torch.int32"),
    "scales that are NaN": (
        "gptq_4_sym",
        _with("scales", lambda t: t.fill_(float("nan"))),
        "scales holds values that are not finite",
    ),
    "zeros of another shape": ("gptq_4_sym", _with("qzeros", lambda t: t[:, 1:]), "qzeros has sh"),
    "weights of another dtype": (
        "gptq_4_sym",
        _with("qweight", lambda t: t.float()),
        "qweight is .* torch.float32, expected a matrix of int32",
    ),
    "a group too far": ("gptq_4_sym", _with("g_idx", lambda t: t + 1), "g_idx names groups beyond"),
    "order of another shape": ("gptq_4_sym", _with("g_idx", lambda t: t[1:]), "g_idx has shape"),
    "fewer inputs": (
        "gptq_4_sym",
        lambda t: {
            k: (v[: len(v) // 2].clone() if k.startswith(f"{MODULE}.") else v) for k, v in t.items()
        },
        r"down_proj\.weight has shape \[64, 64\], the config asks for \[64, 128\]",
    ),
    "nothing of it": (
        "awq_32",
        lambda t: {k: v for k, v in t.items() if "proj" not in k},
        "no tensor is a qweight",
    ),
    "all of one layer": (
        "awq_32",
        lambda t: {k: v for k, v in t.items() if not k.startswith(MODULE)},
        rf"lacks 1 tensors: {MODULE}\.weight",
    ),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_wrong_names_tensor_and_file(what: str, keep: bool, tmp_path: Path) -> None:
    kind, change, words = WRONG[what]
    quantize("llama_gqa_tied", kind, tmp_path, change)
    with pytest.raises(CheckpointError, match=words) as error:
        load(tmp_path, keep=keep, dequantize=not keep)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
