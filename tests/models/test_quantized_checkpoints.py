"""Quantised safetensors: what they hold is what is multiplied, and what cannot be is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.components.ops.libraries import ISAS, library
from tests.models.quantized_checkpoints import (
    FP8,
    IN_FLOATS,
    KINDS,
    SMALL_FLOATS,
    Kind,
    fp8_inv,
    quantize,
    small_floats,
)
from tests.models.ranks import on_ranks
from tests.models.runner import BLOCK, Running, attention, device
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from vllm_di import LLM, SamplingParams
from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.interfaces import Communicator, OpTable, Placement
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.loader.packed import Unpacked
from vllm_di.components.loader.safetensors import SafetensorsLoader
from vllm_di.components.ops.cpu_packing import PackedBytes
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.quantization.kept import KeptWeights
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.components.quantized import QuantizedWeight
from vllm_di.containers.assembly import assemble
from vllm_di.errors import CheckpointError
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


def test_fp8_in_blocks_equals_transformers_own_reading(tmp_path: Path) -> None:
    block = (32, 32)
    kind = Kind(
        FP8 | {"weight_block_size": list(block)}, fp8_inv, 8, draw=small_floats(block=block)
    )
    quantize("llama_gqa_tied", kind, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=FineGrainedFP8Config(weight_block_size=block, dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    )
    assert off(load(tmp_path, dequantize=True).feed(TOKENS), wanted(theirs.eval())) < 1e-4


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
    by_row = kind in ("gptq_8_sym_row", "w8a16", "w8a8")
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


ACT_ORDER = ("gptq_4_act_order", "gptq_8_act_order_v2", "w4a16_order")


@pytest.mark.parametrize("kind", ACT_ORDER)
def test_act_order_on_two_ranks(kind: str, tmp_path: Path) -> None:
    """What a rank has of a group is filled up to a whole one."""
    quantize("llama_gqa_tied", kind, tmp_path)
    want = load(tmp_path).feed(TOKENS)
    for found in on_ranks(2, lambda rank: load(tmp_path, communicator=rank).feed(TOKENS)):
        assert off(found, want) < 1e-4


@pytest.mark.parametrize("kind", ACT_ORDER)
def test_act_order_is_exact(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept, cut into shares and dequantised, a weight is what the checkpoint says."""
    kept: list[tuple[Unpacked, QuantizedWeight]] = []
    keep = Unpacked.keep

    def spy(weight: Unpacked) -> QuantizedWeight:
        kept.append((weight, keep(weight)))
        return kept[-1][1]

    monkeypatch.setattr(Unpacked, "keep", spy)
    quantize("llama_gqa_tied", kind, tmp_path, num_hidden_layers=1)
    load(tmp_path)
    assert len(kept) == 7
    for weight, found in kept:
        exact = weight.dequantize(torch.float32)
        near: dict[str, Any] = {"atol": 1e-6 * float(exact.abs().max()), "rtol": 1e-6}
        assert (found.order is None) == (weight.scale.shape[1] == 1)
        torch.testing.assert_close(found.dequantize(torch.float32), exact, **near)
        width = 32 if found.order is None else 16  # half a group of the checkpoint
        for start in range(0, exact.shape[1], width):
            span = slice(start, start + width)
            share = found.columns(span)
            assert share.group == 32
            torch.testing.assert_close(share.dequantize(torch.float32), exact[:, span], **near)


def test_parts_in_several_orders_are_widened_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.1.mlp.up_proj.g_idx"
    model = quantize("llama_gqa_tied", "gptq_4_act_order", tmp_path, num_hidden_layers=2)
    same = load(tmp_path).feed(TOKENS)
    assert off(same, wanted(model)) < 1e-3
    assert "several act-orders" not in caplog.text
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, tmp_path / "model.safetensors")
    found = load(tmp_path).feed(TOKENS)
    assert "1 products have weights of which" in caplog.text
    want = load(tmp_path, keep=False, dequantize=True).feed(TOKENS)
    assert off(found, want) < 1e-3


def test_act_order_is_refused_where_it_is_not_heeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantization from elsewhere that knows nothing of it gives no wrong token."""
    monkeypatch.setattr(KeptWeights, "takes_order", False)
    quantize("llama_gqa_tied", "gptq_4_act_order", tmp_path, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"does not multiply weights in act-order; loader\."):
        load(tmp_path)
    assert load(tmp_path, dequantize=True).feed(TOKENS).isfinite().all()


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
        r"model\.safetensors: model\.layers\.0\.\S+\.weight is quantized \([\w-]+, .*\d bits, .*\) "
        r"and cannot stay so: .*loader\.dequantize=true"
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


def test_experts_without_products_are_refused_or_widened_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a quantization that multiplies linear layers alone."""
    monkeypatch.setattr(KeptWeights, "takes_experts", False)
    want = wanted(quantize("mixtral", "gptq_4_sym", tmp_path))
    words = r"experts\.\d\.w\d\.weight is quantized .*floats alone; loader\.dequantize=true"
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path)
    with caplog.at_level(logging.INFO):
        assert off(load(tmp_path, dequantize=True).feed(TOKENS), want) < 1e-3
    assert "48 weights are dequantised to float32, as loader.dequantize=true" in caplog.text
    assert "16 weights stay as the checkpoint has them" in caplog.text  # attention's


@pytest.mark.parametrize("kind", ["fp8_blocks", "w8a8", "w4a16_order"])
def test_experts_of_other_formats(kind: str, tmp_path: Path) -> None:
    want = wanted(quantize("qwen3_moe", kind, tmp_path, moe_intermediate_size=64))
    assert off(load(tmp_path, dequantize=True).feed(TOKENS), want) < 1e-3


@pytest.mark.parametrize("kind", ["fp8_tensor", "ct_fp8_rows"])
def test_scales_of_activations_are_left_out_with_a_line(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize("llama_gqa_tied", kind, tmp_path)
    load(tmp_path, dequantize=True)
    assert "28 scales of activations and of the KV cache are left out" in caplog.text


def test_zero_points_beside_a_symmetric_scheme_are_read(tmp_path: Path) -> None:
    """Older tools write them, all zeros; what is written is what counts."""
    model = quantize(
        "llama_gqa_tied",
        "w8a8",
        tmp_path,
        lambda t: (
            t
            | {
                name.replace("_scale", "_zero_point"): torch.zeros(scale.shape, dtype=torch.int8)
                for name, scale in t.items()
                if name.endswith("weight_scale")
            }
        ),
    )
    assert off(load(tmp_path).feed(TOKENS), wanted(model)) < 1e-3


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


@pytest.mark.parametrize("kind", SMALL_FLOATS)
def test_small_floats_are_chosen_by_nobody(kind: str, tmp_path: Path) -> None:
    quantize("llama_gqa_tied", kind, tmp_path)
    assert choice(tmp_path, "platform=cpu")[0] == "none"


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
