"""From a GGUF file's metadata to the ``config.json`` of the model that it holds.

Key names: the GGUF specification (ggml-org/ggml, docs/gguf.md). What llama.cpp writes into no key
but into its own code (Gemma's scale, SmolLM3's layers without rotary) is set here likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_di.errors import CheckpointError, UnsupportedModelError
from vllm_di.models.gguf_keys import refuse_unknown_keys

Facts = Mapping[str, Any]
Config = dict[str, Any]
Vector = Callable[[str], Sequence[float] | None]
"""The values of a small tensor; None where the file has no tensor of that name."""

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
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "GraniteForCausalLM": "granite",
    "SmolLM3ForCausalLM": "smollm3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Phi3ForCausalLM": "phi3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
}
"""Class to the word by which other readers of a ``config.json`` (transformers, vLLM) know it."""
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
"""Rope scaling that all of Meta's Llama 3.x share; a GGUF holds the divisors that follow from
it."""
REQUIRED = (
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "attention.head_count",
    "context_length",
)
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
"""Settings that a GGUF has no key for: the presence of tensors decides them."""
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def hf_config(facts: Facts, *, vocab_size: int, tied: bool, vector: Vector) -> Config:
    """``config.json`` of a native family. Raises UnsupportedModelError for a setting that it cannot
    express."""
    arch = str(facts.get("general.architecture"))
    if arch not in CLASSES:
        raise UnsupportedModelError(
            f"GGUF files of architecture {arch!r} are not supported; supported are "
            f"{', '.join(CLASSES)}"
        )
    refuse_unknown_keys(facts, arch)
    config: Config = {"rope_theta": 10000.0}
    for name, key in COMMON.items():
        value = facts.get(f"{arch}.{key}")
        if isinstance(value, list):
            raise UnsupportedModelError(f"a {arch} file with {arch}.{key} for each layer")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{arch}.{key} is {value!r}: expected a number")
        config[name] = value
    for key in REQUIRED:
        value = facts.get(f"{arch}.{key}")
        if value is None:
            raise CheckpointError(f"{arch}.{key} is missing")
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{arch}.{key} is {value!r}: expected a whole number above 0")
    config |= {
        "architectures": [CLASSES[arch]],
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "bos_token_id": facts.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": facts.get("tokenizer.ggml.eos_token_id"),
    }
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    if size < 2:
        raise CheckpointError(
            f"heads have a size of {size}: {arch}.attention.head_count is {heads}, "
            f"embedding_length {config['hidden_size']}, attention.key_length "
            f"{config.get('head_dim')}"
        )
    config["head_dim"] = size
    config.setdefault("num_key_value_heads", heads)
    if (of_values := facts.get(f"{arch}.attention.value_length", size)) != size:
        raise UnsupportedModelError(
            f"{arch}.attention.value_length is {of_values}, but that of the keys is {size}: heads "
            "of two sizes are not supported"
        )
    rotated = int(facts.get(f"{arch}.rope.dimension_count") or size)
    if rotated != size:
        config["partial_rotary_factor"] = rotated / size
    if scaling := _scaling(facts, arch, vector, rotated, float(config.get("rope_theta") or 1e4)):
        config["rope_scaling"] = scaling
        if "original_max_position_embeddings" in scaling:  # Phi-3's class reads it from there
            old = scaling["original_max_position_embeddings"]
            config["original_max_position_embeddings"] = old
    if arch not in ("qwen2", "phi3"):  # these two have the biases of their class
        for name, tensor in BIASES.items():
            if vector(tensor) is not None:
                config[name] = True
    config |= _family(arch, facts, config, size)
    return config | {"model_type": MODEL_TYPES[config["architectures"][0]]}


def end_tokens(facts: Facts) -> list[int]:
    """Ids that end an answer: end of text, of turn, of message."""
    found = (facts.get(f"tokenizer.ggml.{name}") for name in ENDS)
    return list(dict.fromkeys(int(token) for token in found if token is not None))


SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Keys of generation_config.json and those of a GGUF behind ``general.sampling.``."""


def generation_config(facts: Facts) -> Config:
    """``generation_config.json``: the ends of an answer, and how its authors sample."""
    found: Config = {"eos_token_id": end_tokens(facts)}
    prefix = "general.sampling."
    names = {f"{prefix}{key}": name for name, key in SAMPLING.items()}
    for key, value in facts.items():
        if key.startswith(prefix):
            found[names.get(key, key.removeprefix(prefix))] = value
    return found


def _family(arch: str, facts: Facts, config: Config, size: int) -> Config:
    experts = facts.get(f"{arch}.expert_count")
    if arch == "llama":
        window = config.get("sliding_window")
        if experts:
            return {"architectures": ["MixtralForCausalLM"], "num_local_experts": experts}
        return {"architectures": ["MistralForCausalLM"]} if window else {}
    if arch == "qwen3moe":
        # llama.cpp gives the experts equal shares of the whole where the key is absent
        share = config["intermediate_size"] // max(int(config.get("num_experts_per_tok", 1)), 1)
        return {"num_experts": experts, "norm_topk_prob": True} | (
            {} if "moe_intermediate_size" in config else {"moe_intermediate_size": share}
        )
    if arch in ("gemma2", "gemma3"):
        # the 27B models scale by the width of a head's share of the stream, not by its size
        layers, large = config["num_hidden_layers"], {"gemma2": 46, "gemma3": 62}[arch]
        share = config["hidden_size"] // config["num_attention_heads"]
        found: Config = {"query_pre_attn_scalar": share if layers == large else size}
        if local := facts.get("gemma3.rope.freq_base_swa"):
            found["rope_local_base_freq"] = local
        if arch == "gemma3" and not config.get("sliding_window"):
            return found | {"sliding_window": None}
        pattern = facts.get(f"{arch}.attention.sliding_window_pattern")
        return found | ({} if pattern is None else {"layer_types": _layer_types(pattern, layers)})
    return {}


def _layer_types(pattern: int | Sequence[bool], layers: int) -> list[str]:
    """One flag for each layer; or n: a window in all layers except each n-th."""
    if isinstance(pattern, int):
        slides = [pattern == 0 or (i + 1) % pattern != 0 for i in range(layers)]
    else:
        slides = [bool(flag) for flag in pattern]
    if len(slides) != layers:
        raise CheckpointError(
            f"attention.sliding_window_pattern has {len(slides)} entries for {layers} layers"
        )
    return ["sliding_attention" if slid else "full_attention" for slid in slides]


def _scaling(facts: Facts, arch: str, vector: Vector, rotated: int, theta: float) -> Config | None:
    prefix = f"{arch}.rope.scaling."
    values = {
        key.removeprefix(prefix): value for key, value in facts.items() if key.startswith(prefix)
    }
    # a factor without a kind is linear, and the key of old files stands for it (llama.cpp's rules)
    kind = values.pop("type", "linear")
    factor = values.pop("factor", facts.get(f"{arch}.rope.scale_linear")) or 1.0
    old = values.pop("original_context_length", None) or facts.get(f"{arch}.context_length")
    for key in ("finetuned", "yarn_ext_factor"):
        values.pop(key, None)  # checked by gguf_keys
    found: Config | None
    if (divisors := vector("rope_freqs.weight")) is not None:
        if kind != "none" and factor != 1.0:
            raise UnsupportedModelError(
                f"{prefix}factor is {factor} beside rope_freqs.weight: two scalings of one table "
                "are not supported"
            )
        found = _llama3(divisors, rotated, theta)
    elif kind == "longrope" or vector("rope_factors_long.weight") is not None:
        long, short = vector("rope_factors_long.weight"), vector("rope_factors_short.weight")
        if long is None or short is None:
            raise CheckpointError(
                f"{prefix}type is {kind!r}: rope_factors_long.weight or rope_factors_short.weight "
                "is missing"
            )
        found = {"rope_type": "longrope", "long_factor": list(long), "short_factor": list(short)}
        amplitude = values.pop("attn_factor", None)
        found |= {"attention_factor": amplitude} if amplitude is not None else {}
        found |= {"original_max_position_embeddings": old}
    elif kind == "linear":
        found = {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    elif kind == "yarn":
        found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": old}
        found |= _yarn(values, factor)
    elif kind == "none":
        found = None
    else:
        raise UnsupportedModelError(f"{prefix}type {kind!r} is not supported")
    for key, value in values.items():
        if value not in (0, 1.0, None):
            raise UnsupportedModelError(
                f"{prefix}{key} is {value!r}, which rotary scaling "
                f"{found['rope_type'] if found else 'none'!r} does not have"
            )
    return found


def _yarn(values: dict[str, Any], factor: float) -> Config:
    """Takes YaRN's own keys out of ``values``. ``yarn_attn_factor`` is the amplitude of the table,
    ``attn_factor`` multiplies what llama.cpp takes by default."""
    names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    found = {name: values.pop(key) for name, key in names.items() if key in values}
    amplitude = values.pop("yarn_attn_factor", None)
    more = values.pop("attn_factor", 1.0)
    if amplitude is None and more != 1.0:
        amplitude = 1.0 + 0.1 * math.log(max(factor, 1.0))
    return found | ({} if amplitude is None else {"attention_factor": amplitude * more})


def _llama3(divisors: Sequence[float], rotated: int, theta: float) -> Config | None:
    """The largest divisor is the factor; the others must follow from it."""
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
