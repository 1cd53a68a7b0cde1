"""From a GGUF file's metadata to the ``config.json`` of the model that it holds.

Key names: the GGUF specification (ggml-org/ggml, docs/gguf.md). What llama.cpp writes into no key
but into its own code (Gemma's scale, SmolLM3's layers without rotary) is set here likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_di.errors import UnsupportedModelError

Facts = Mapping[str, Any]
Config = dict[str, Any]
Vector = Callable[[str], Sequence[float] | None]
"""The values of a small tensor, None where the file has none of that name."""

CLASSES = {
    "llama": "LlamaForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
COMMON = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all of Meta's Llama 3.x share; a GGUF holds the divisors that follow from it instead."""
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
"""Settings that a GGUF has no key for: the tensors are there, or not."""
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def hf_config(facts: Facts, *, vocab_size: int, tied: bool, vector: Vector) -> Config:
    """``config.json`` of a native family. Raises UnsupportedModelError for what cannot be said in
    one."""
    arch = str(facts.get("general.architecture"))
    if arch not in CLASSES:
        raise UnsupportedModelError(
            f"GGUF files of architecture {arch!r} are not supported; supported are "
            f"{', '.join(CLASSES)}"
        )
    config: Config = {
        name: value
        for name, key in COMMON.items()
        if (value := facts.get(f"{arch}.{key}")) is not None
    }
    for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
        if isinstance(config.get(name), list):
            raise UnsupportedModelError(f"a {arch} file with {name} for each layer")
    config |= {
        "architectures": [CLASSES[arch]],
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "bos_token_id": facts.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": facts.get("tokenizer.ggml.eos_token_id"),
    }
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    rotated = int(facts.get(f"{arch}.rope.dimension_count") or size)
    if rotated != size:
        config["partial_rotary_factor"] = rotated / size
    if scaling := _scaling(facts, arch, vector, rotated, float(config.get("rope_theta") or 1e4)):
        config["rope_scaling"] = scaling
    if arch not in ("qwen2", "phi3"):  # these two have the biases of their class
        for name, tensor in BIASES.items():
            if vector(tensor) is not None:
                config[name] = True
    return config | _family(arch, facts, config, size)


def end_tokens(facts: Facts) -> list[int]:
    """Ids that end an answer: of the text, of a turn, of a message."""
    found = (facts.get(f"tokenizer.ggml.{name}") for name in ENDS)
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def _family(arch: str, facts: Facts, config: Config, size: int) -> Config:
    experts = facts.get(f"{arch}.expert_count")
    if arch == "llama":
        window = config.get("sliding_window")
        if experts:
            return {"architectures": ["MixtralForCausalLM"], "num_local_experts": experts}
        return {"architectures": ["MistralForCausalLM"]} if window else {}
    if arch == "qwen3moe":
        return {"num_experts": experts, "norm_topk_prob": True}
    if arch in ("gemma2", "gemma3"):
        # the 27B models scale by the width of a head's share of the stream, not by its size
        layers, large = config["num_hidden_layers"], {"gemma2": 46, "gemma3": 62}[arch]
        share = config["hidden_size"] // config["num_attention_heads"]
        local = facts.get("gemma3.rope.freq_base_swa")
        return {"query_pre_attn_scalar": share if layers == large else size} | (
            {"rope_local_base_freq": local} if local else {}
        )
    return {}


def _scaling(facts: Facts, arch: str, vector: Vector, rotated: int, theta: float) -> Config | None:
    prefix = f"{arch}.rope.scaling."
    kind = facts.get(f"{prefix}type")
    old = facts.get(f"{prefix}original_context_length")
    if (divisors := vector("rope_freqs.weight")) is not None:
        return _llama3(divisors, rotated, theta)
    long, short = vector("rope_factors_long.weight"), vector("rope_factors_short.weight")
    if long is not None and short is not None:
        found = {"rope_type": "longrope", "long_factor": list(long), "short_factor": list(short)}
        amplitude = facts.get(f"{prefix}attn_factor")
        found |= {"attention_factor": amplitude} if amplitude is not None else {}
        return found | {"original_max_position_embeddings": old}
    factor = facts.get(f"{prefix}factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": old}
    if kind in (None, "none"):
        return None
    raise UnsupportedModelError(f"a {arch} file with rotary scaling {kind!r} is not supported")


def _llama3(divisors: Sequence[float], rotated: int, theta: float) -> Config | None:
    """The divisors' largest is the factor; the others must follow from it."""
    scaling = LLAMA3 | {"factor": round(max(divisors), 3)}
    factor, old = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    for pair, divisor in enumerate(divisors):
        turns = old * theta ** (-2 * pair / rotated) / (2 * math.pi)
        ramp = min(max((turns - low) / (high - low), 0.0), 1.0)
        if abs(1 / (ramp + (1 - ramp) / factor) - divisor) > 1e-3 * divisor:
            raise UnsupportedModelError(
                "rope_freqs.weight holds rotary divisors that are not Llama 3's; "
                "take the model's safetensors"
            )
    return scaling if factor != 1 else None
