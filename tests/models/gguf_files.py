"""Small GGUF files, written with the gguf package's own tables of names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from vllm_di.components.loader.safetensors import find_files, read_files

ARCHS: dict[str, Any] = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MixtralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "GraniteForCausalLM": gguf.MODEL_ARCH.GRANITE,
    "SmolLM3ForCausalLM": gguf.MODEL_ARCH.SMOLLM3,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Qwen3MoeForCausalLM": gguf.MODEL_ARCH.QWEN3MOE,
    "Phi3ForCausalLM": gguf.MODEL_ARCH.PHI3,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
}
PERMUTED = ("llama", "granite", "smollm3")
EXPERTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up"}


def write(
    folder: Path, file: Path, extra: dict[str, list[float]] | None = None, matrices: Any = None
) -> Path:
    """A GGUF of the safetensors checkpoint in ``folder``, as llama.cpp's converter lays it out;
    ``extra`` are more tensors, ``matrices`` their type."""
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHS[config["architectures"][0]]
    name = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(file, name)
    _metadata(writer, config)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    experts: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    for key, tensor in read_files(find_files(folder)):
        array = tensor.float().numpy()
        stem, _, kind = key.rpartition(".")
        if ".experts." in stem:
            before, _, after = stem.partition(".experts.")
            number, _, part = after.partition(".")
            layer = before.split(".")[2]
            place = f"blk.{layer}.ffn_{EXPERTS.get(part, 'down')}_exps.weight"
            experts.setdefault(place, {})[int(number)] = array
            continue
        if name in PERMUTED and stem.endswith(("q_proj", "k_proj")):
            which = "num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"
            array = _permute(array, config[which])
        if name in ("gemma2", "gemma3") and stem.endswith("norm"):
            array = array + 1
        found = names.get_name(stem)
        assert found is not None, stem
        array = np.ascontiguousarray(array)
        if matrices is not None and array.ndim == 2:
            data = gguf.quantize(array, matrices)
            writer.add_tensor(f"{found}.{kind}", data, raw_dtype=matrices)
        else:
            writer.add_tensor(f"{found}.{kind}", array)
    for place, parts in experts.items():
        stacked = np.stack([parts[i] for i in sorted(parts)])
        data = stacked if matrices is None else gguf.quantize(stacked, matrices)
        writer.add_tensor(place, data, raw_dtype=matrices)
    for key, values in (extra or {}).items():
        writer.add_tensor(key, np.array(values, np.float32))
    return finish(writer, file)


def finish(writer: Any, file: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _permute(array: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a head from halves to neighbours."""
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def _metadata(writer: Any, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if local is not None and local["rope_theta"] != 10000.0:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    for key, add in {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
        "num_local_experts": writer.add_expert_count,
        "num_experts": writer.add_expert_count,
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
    }.items():
        if config.get(key) is not None:
            add(config[key])


def quantized(file: Path, kind: Any, rows: int = 3, columns: int = 512) -> torch.Tensor:
    """A file with one tensor of a type; returns what it holds."""
    values = np.random.default_rng(1).standard_normal((rows, columns), np.float32)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_head_count(1)
    data = gguf.quantize(values, kind) if can_quantize(kind) else random_blocks(kind, rows, columns)
    writer.add_tensor("output.weight", data, raw_dtype=kind)
    finish(writer, file)
    return torch.from_numpy(gguf.dequantize(data, kind).copy())


def can_quantize(kind: Any) -> bool:
    """gguf writes the simple types, and only reads those of llama.cpp's k-quants."""
    return not kind.name.endswith("_K")


def random_blocks(kind: Any, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Any bytes are a valid block, if its fp16 scales are finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(2).integers(0, 60, (rows, columns // block * size), np.uint8)
