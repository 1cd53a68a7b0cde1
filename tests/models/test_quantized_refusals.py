"""Quantised safetensors that cannot be read: each error names tensor, file and scheme."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.quantized_checkpoints import (
    quantize,
)
from tests.models.test_quantized_checkpoints import load

from vllm_di.containers.assembly import assemble
from vllm_di.errors import CheckpointError, UnsupportedModelError

W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def ct(
    weights: dict[str, Any] | None = None, more: dict[str, Any] | None = None, **node: Any
) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with changes."""
    groups = {"a": {"weights": W4 | (weights or {})}, **(more or {})}
    start = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return start | {"config_groups": groups} | node


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
    "nvfp4": (ct(format="nvfp4-pack-quantized"), "format of its .*'nvfp4-pack-quantized' is not"),
    "sparse": (ct(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config of its"),
    "rotated": (
        ct(transform_config={"config_groups": {"u": {}}}),
        "transform_config of its .*rotat",
    ),
    "no groups": (ct(config_groups={}), "config_groups of its .*: expected groups of weights"),
    "no weights": (
        ct(config_groups={"a": {}}),
        r"config_groups\.a\.weights of its .*expected what",
    ),
    "2 bits": (ct({"num_bits": 2}), r"config_groups\.a\.weights\.num_bits of its .* 2 is not supp"),
    "no bits in a group": (ct({"num_bits": None}), r"weights\.num_bits of its .* is missing"),
    "by token": (ct({"strategy": "token"}), r"weights\.strategy of its config.json 'token' is not"),
    "in between": (
        ct({"type": "float", "num_bits": 8}),
        r"weights\.type of its .* does not go with",
    ),
    "when it runs": (ct({"dynamic": True}), r"weights\.dynamic of its config.json True is not"),
    "a group of 0": (ct({"group_size": 0}), r"weights\.group_size of its config.json 0: expected"),
    "two schemes": (ct(more={"b": {"weights": W4 | {"group_size": 64}}}), "groups of several"),
    "fp8 of another kind": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt of its .* 'e5m2' is not"),
    "half a block": ({"quant_method": "fp8", "weight_block_size": [128]}, "expected two counts"),
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


ONE_OF_EACH = (
    "awq_32",
    "gptq_4_sym",
    "w4a16_asym",
    "w8a8_asym",
    "fp8_tensor",
    "fp8_blocks",
    "ct_fp8_rows",
)
"""Kinds that have every tensor that a format needs."""
MAY_BE_ABSENT = ("g_idx", "input_scale")


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_every_missing_tensor_is_named(kind: str, tmp_path: Path) -> None:
    quantize("llama_gqa_tied", kind, tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    parts = [name for name in whole if name.startswith(f"{MODULE}.")]
    needed = [name for name in parts if not name.endswith(MAY_BE_ABSENT)]
    assert len(needed) >= 2
    for name in needed:
        save_file({k: v for k, v in whole.items() if k != name}, file)
        words = rf"model\.safetensors: tensor {name} is missing beside {MODULE}\..* supported are"
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path, dequantize=True)


@pytest.mark.parametrize("kind", ["awq_32", "gptq_4_act_order", "w4a16_asym", "w8a8_asym"])
def test_every_missing_tensor_of_an_expert_is_named(kind: str, tmp_path: Path) -> None:
    quantize("mixtral", kind, tmp_path, num_hidden_layers=1)
    file = tmp_path / "model.safetensors"
    whole, expert = load_file(file), "model.layers.0.block_sparse_moe.experts.2.w2"
    parts = [name for name in whole if name.startswith(f"{expert}.")]
    for name in (part for part in parts if not part.endswith(MAY_BE_ABSENT)):
        save_file({k: v for k, v in whole.items() if k != name}, file)
        words = rf"model\.safetensors: tensor {name} is missing beside {expert}\..* supported are"
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path)


@pytest.mark.parametrize("kind", [*ONE_OF_EACH, "gptq_4_act_order", "w4a16_order"])
@pytest.mark.parametrize("case", ["llama_gqa_tied", "mixtral"])
def test_every_tensor_that_is_cut_is_named(case: str, kind: str, tmp_path: Path) -> None:
    """By its last row or column, or to nothing."""
    quantize(case, kind, tmp_path, num_hidden_layers=1)
    file = tmp_path / "model.safetensors"
    whole, keep = load_file(file), not kind.startswith(("fp8", "ct_fp8"))
    down = "mlp.down_proj" if case == "llama_gqa_tied" else "block_sparse_moe.experts.2.w2"
    parts = [n for n in whole if f"{down}." in n and not n.endswith("input_scale")]
    for name in parts:
        tensor = whole[name]
        cuts = [tensor[:-1], tensor[:0]] if tensor.dim() else []
        cuts += [tensor[:, :-1]] if tensor.dim() == 2 and tensor.shape[1] > 1 else []
        for cut in cuts:
            save_file(whole | {name: cut.contiguous()}, file)
            with pytest.raises(CheckpointError) as error:
                load(tmp_path, keep=keep, dequantize=not keep)
            assert down in str(error.value)
            assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
@pytest.mark.parametrize("keep", [True, False])
def test_a_truncated_file_is_named(share: float, keep: bool, tmp_path: Path) -> None:
    quantize("llama_gqa_tied", "gptq_4_sym", tmp_path, num_hidden_layers=1)
    file = tmp_path / "model.safetensors"
    os.truncate(file, int(share * file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or truncated"):
        load(tmp_path, keep=keep, dequantize=True)


WRONG: dict[str, tuple[str, Any, str]] = {
    "fp8 without scales": (
        "fp8_blocks",
        lambda t: {k: v for k, v in t.items() if not k.endswith("_inv")},
        r"down_proj\.weight_scale_inv is missing",
    ),
    "fp8 of another kind": (
        "fp8_tensor",
        _with("weight", lambda t: t.float().to(torch.float8_e5m2)),
        "weight is .*e5m2, expected a matrix of torch.float8_e4m3fn",
    ),
    "fp8 in floats": ("fp8_tensor", _with("weight", lambda t: t.float()), "weight is .*float32"),
    "a scale for each of half the rows": (
        "ct_fp8_rows",
        _with("weight_scale", lambda t: t[::2]),
        r"weight_scale has shape \[32, 1\], expected \[64, 1\]",
    ),
    "a block too few": (
        "fp8_blocks",
        _with("weight_scale_inv", lambda t: t[1:]),
        r"weight_scale_inv has shape \[1, 4\], expected \[2, 4\]",
    ),
    "an infinite scale": (
        "fp8_tensor",
        _with("weight_scale", lambda t: t / 0),
        "weight_scale holds values that are not finite",
    ),
    "zero points of another shape": (
        "w4a16_asym",
        _with("weight_zero_point", lambda t: t[1:]),
        r"weight_zero_point has shape \[7, 2\], expected \[8, 2\]",
    ),
    "zero points of another dtype": (
        "w8a8_asym",
        _with("weight_zero_point", lambda t: t.int()),
        "weight_zero_point is .*int32, expected one int8 for each scale",
    ),
    "a shape that is another": (
        "w4a16",
        _with("weight_shape", lambda t: t * 2),
        "weight_packed has shape",
    ),
    "a group too far in act-order": (
        "w4a16_order",
        _with("weight_g_idx", lambda t: t - 1),
        "weight_g_idx names groups beyond the 4",
    ),
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
        load(tmp_path, keep=keep, dequantize=True)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
