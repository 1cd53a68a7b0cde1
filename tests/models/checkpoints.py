"""Small random checkpoints of every native family, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 2.3],
    "original_max_position_embeddings": 256,
}
MOE = {"num_experts_per_tok": 2, "initializer_range": 0.2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": False}),
    "llama_gqa_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3.1_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_linear_rope": ("Llama", {"rope_parameters": LINEAR}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_window": ("Mistral", {"sliding_window": 13}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3_longrope": (
        "Phi3",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 256,
            "sliding_window": 21,
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 11,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 24},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **MOE}),
    "mixtral_window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 7, **MOE}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 6, "moe_intermediate_size": 40, "norm_topk_prob": True, **MOE},
    ),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "moe_intermediate_size": 40,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            **MOE,
        },
    ),
}


def make(case: str, folder: Path, **more: Any) -> Any:
    """Save a checkpoint; returns transformers' model in fp32."""
    family, changes = CASES[case]
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**(SHAPE | changes | more))
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():  # fresh norms and biases are all ones and zeros: they would test nothing
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model
