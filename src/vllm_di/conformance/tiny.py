"""Tiny checkpoints, made by script with a fixed seed: what the whole-model checks run."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB = 320
"""The byte tokenizer's 256 bytes and special tokens, with a few to spare."""
CONTEXT = 256
"""Longest sequence."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "attention_bias": False,
}

MODELS: dict[str, dict[str, Any]] = {
    "gqa": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "tied": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "moe": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "window": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 13,
    },
    "bias": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},  # of q, k and v
}
LARGER: dict[str, dict[str, Any]] = {
    "wide": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 70_001,
        "tie_word_embeddings": True,
    },
    "long": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 2560,
    },
    "mixed": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 13,
        "max_window_layers": 1,  # whole attention in the first, so that there are two KV groups
    },
}
"""Models that only one check runs: a vocabulary of more than 16 bits, a long context, layers with
a window and without."""
FEATURES = {"moe": "mixture of experts", "window": "sliding window", "tied": "tied embeddings"}
"""Model to the row of the matrix that it proves."""


def hf_config(name: str, head_size: int) -> dict[str, Any]:
    """The model's ``config.json``."""
    return _SHAPE | {"head_dim": head_size} | (MODELS | LARGER)[name]


def tensors(name: str, head_size: int) -> dict[str, Tensor]:
    """Hugging Face name to fp32 weight. Each depends on its own name alone."""
    c = hf_config(name, head_size)
    hidden, inter, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    queries, keys = (c[f"num_{k}_heads"] * head_size for k in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(c["num_hidden_layers"]):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{attention}.q_proj.weight": (queries, hidden),
            f"{attention}.k_proj.weight": (keys, hidden),
            f"{attention}.v_proj.weight": (keys, hidden),
            f"{attention}.o_proj.weight": (hidden, queries),
        }
        if c["model_type"] == "qwen2":
            shapes |= {
                f"{attention}.q_proj.bias": (queries,),
                f"{attention}.k_proj.bias": (keys,),
                f"{attention}.v_proj.bias": (keys,),
            }
        if experts := c.get("num_local_experts"):
            sparse = f"{layer}.block_sparse_moe"
            shapes[f"{sparse}.gate.weight"] = (experts, hidden)
            for e in range(experts):
                shapes[f"{sparse}.experts.{e}.w1.weight"] = (inter, hidden)
                shapes[f"{sparse}.experts.{e}.w3.weight"] = (inter, hidden)
                shapes[f"{sparse}.experts.{e}.w2.weight"] = (hidden, inter)
        else:
            shapes[f"{layer}.mlp.gate_proj.weight"] = (inter, hidden)
            shapes[f"{layer}.mlp.up_proj.weight"] = (inter, hidden)
            shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inter)
    scales = _Scales(tied=c["tie_word_embeddings"])
    return {key: _random(key, shape, scales.of(key)) for key, shape in shapes.items()}


def write(
    folder: Path,
    name: str,
    head_size: int,
    *,
    weights: Mapping[str, Tensor] | None = None,
    num_files: int = 1,
) -> Path:
    """A checkpoint folder, with the model's own weights or others; in several files with an
    index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(name, head_size), indent=1))
    found = dict(tensors(name, head_size) if weights is None else weights)
    if num_files == 1:
        save_file(found, folder / "model.safetensors")
        return folder
    places: dict[str, str] = {}
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = {key: found[key] for key in sorted(found)[i::num_files]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class _Scales:
    """Standard deviations with which narrow dtypes differ little from fp32: embeddings outweigh
    layers, routers choose clearly, and experts add little, so that another expert does not change
    the answer."""

    def __init__(self, *, tied: bool) -> None:
        self._tied = tied

    def of(self, key: str) -> float:
        if "lm_head" in key or (self._tied and "embed" in key):
            return 0.12
        if "embed" in key:
            return 1.0
        layers = 0.12 if self._tied else 0.05
        return layers * (6.0 if ".gate." in key else 0.1 if ".w2." in key else 1.0)


def _random(key: str, shape: tuple[int, ...], scale: float) -> Tensor:
    """Values that bfloat16 and float16 hold exactly: all dtypes run the same weights."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    values = torch.randn(shape, dtype=torch.float32, generator=generator)
    if key.endswith(".bias"):
        values = 0.5 * values
    elif len(shape) == 1:  # of a norm
        values = 1 + 0.1 * values
    else:
        values = scale * values
    return values.bfloat16().float()
