"""What a ``config.json`` leaves out, and what it may not hold.

transformers writes only what differs from a class's defaults, so these belong to the reading of a
config. A key that nobody here knows is refused: it could change the result.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from vllm_di.errors import UnsupportedModelError

Config = Mapping[str, Any]

GEMMA = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": ENDS | {"max_position_embeddings": 2048},
    "GraniteForCausalLM": ENDS | {"max_position_embeddings": 2048},
    "MistralForCausalLM": ENDS
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "MixtralForCausalLM": ENDS
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Qwen2ForCausalLM": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "sliding_window": 4096,
    },
    "Qwen3ForCausalLM": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "sliding_window": 4096,
    },
    "Qwen3MoeForCausalLM": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "sliding_window": 4096,
    },
    "SmolLM3ForCausalLM": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "Phi3ForCausalLM": {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
    "Gemma2ForCausalLM": GEMMA
    | {
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma3ForCausalLM": GEMMA
    | {
        "max_position_embeddings": 131072,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "rope_theta": 1000000.0,
    },
}
"""Values that transformers' config classes take for a key that is absent, where ours differ."""

USED = frozenset(
    [
        "architectures",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "attention_bias",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rope_local_base_freq",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "sliding_window",
        "layer_types",
        "bos_token_id",
        "eos_token_id",
    ]
)
FAMILY_USED: dict[str, frozenset[str]] = {
    name: frozenset(keys.split())
    for name, keys in {
        "LlamaForCausalLM": "mlp_bias pretraining_tp",
        "Qwen2ForCausalLM": "use_sliding_window max_window_layers",
        "Qwen3ForCausalLM": "use_sliding_window max_window_layers",
        "Qwen3MoeForCausalLM": "use_sliding_window max_window_layers num_experts "
        "num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob "
        "decoder_sparse_step mlp_only_layers",
        "MixtralForCausalLM": "num_local_experts num_experts num_experts_per_tok",
        "SmolLM3ForCausalLM": "mlp_bias use_sliding_window no_rope_layers no_rope_layer_interval "
        "max_window_layers pretraining_tp",
        "GraniteForCausalLM": "mlp_bias attention_multiplier embedding_multiplier "
        "residual_multiplier logits_scaling pretraining_tp",
        "Phi3ForCausalLM": "interpolate_factor full_attn_mod",
        "Gemma2ForCausalLM": "hidden_activation query_pre_attn_scalar attn_logit_softcapping "
        "final_logit_softcapping use_bidirectional_attention",
        "Gemma3ForCausalLM": "hidden_activation query_pre_attn_scalar attn_logit_softcapping "
        "final_logit_softcapping sliding_window_pattern use_bidirectional_attention",
    }.items()
}
HARMLESS = frozenset(
    [
        "model_type",
        "name_or_path",
        "torch_dtype",
        "dtype",
        "use_cache",
        "cache_implementation",
        "return_dict",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "pruned_heads",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "task_specific_params",
        "tokenizer_class",
        "prefix",
        "auto_map",
        "initializer_range",
        "keys_to_ignore_at_inference",
        "finetuning_task",
        "is_llama_config",
        "rope_interleaved",
        "rope_theta_scaling",
        "sliding_window_size",
        "pad_token",
        "tokenizer_model_max_length",
        "max_sequence_length",
        "model_max_length",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "quantization_config",
    ]
)
"""Of training, of generation, or about the file: no part of the forward pass."""
HARMLESS_STARTS = ("_", "output_", "transformers", "unsloth", "router_aux", "router_jitter")
HARMLESS_ENDS = ("_dropout", "_pdrop", "_version", "_token_id", "_token_ids", "_token_index")
NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})


def with_defaults(config: Config) -> dict[str, Any]:
    """The config with its family's defaults for what it leaves out."""
    return {**DEFAULTS.get(config["architectures"][0], {}), **config}


def shorten(value: Any, limit: int = 80) -> str:
    """A value of a config as messages show it: one line, of a bounded length."""
    text = reprlib.repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def refuse_unknown(config: Config, own: Collection[str] = ()) -> None:
    """Raises UnsupportedModelError for a key that might change the result and is not understood.
    ``own`` are keys that the model's class has beside ours."""
    architecture = config["architectures"][0]
    known = {*USED, *HARMLESS, *FAMILY_USED.get(architecture, ()), *own}
    for key, value in config.items():
        if (
            key in known
            or key.startswith(HARMLESS_STARTS)
            or key.endswith(HARMLESS_ENDS)
            or value in NEUTRAL
        ):
            continue
        raise UnsupportedModelError(
            f"config.json of {architecture} sets {key}={shorten(value)}, which the native decoder "
            "does not know; transformers' own code may: model.implementation=transformers"
        )


def refuse(config: Config, **expected: Any) -> None:
    """Raises UnsupportedModelError where a key is set to anything but the one supported value."""
    for name, value in expected.items():
        if config.get(name) not in (value, None):
            raise UnsupportedModelError(
                f"{config['architectures'][0]} with {name}={config[name]!r} is not supported "
                f"(only {value!r})"
            )
