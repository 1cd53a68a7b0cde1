"""Reading config.json: transformers' own classes are the judge of every family's defaults."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from vllm_di.errors import ConfigError, UnsupportedModelError
from vllm_di.models import encoder_config
from vllm_di.models.config import DecoderConfig
from vllm_di.models.hf_config import FAMILIES, is_native, model_fields
from vllm_di.models.hf_settings import FAMILY_USED, USED

SIZES = {
    "vocab_size": 99,
    "hidden_size": 512,
    "intermediate_size": 72,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
}


def full(architecture: str, **changes: Any) -> dict[str, Any]:
    """Every key of the family's config class, as transformers would write them all out."""
    family = architecture.removesuffix("ForCausalLM")
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**(SIZES | changes))
    return {**config.to_dict(), "architectures": [architecture]}


def effective(config: dict[str, Any]) -> DecoderConfig:
    return DecoderConfig(**model_fields(config)).complete()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_key_that_is_left_out_means_the_class_default(architecture: str) -> None:
    config = full(architecture)
    want = effective(config)
    for key in (USED | FAMILY_USED.get(architecture, frozenset())) - {"architectures", *SIZES}:
        fewer = {k: v for k, v in config.items() if k != key}
        assert effective(fewer) == want, key


@pytest.mark.parametrize(
    "architecture", [name for name, keys in FAMILY_USED.items() if "use_sliding_window" in keys]
)
def test_a_window_that_is_turned_on_has_the_size_of_the_class(architecture: str) -> None:
    config = full(architecture, use_sliding_window=True, max_window_layers=3)
    fewer = {k: v for k, v in config.items() if k not in ("sliding_window", "layer_types")}
    assert effective(fewer) == effective(config)
    assert effective(fewer).sliding_window == config["sliding_window"]


@pytest.mark.parametrize("architecture", encoder_config.ENCODERS)
def test_a_key_of_an_encoder_that_is_left_out_means_the_class_default(architecture: str) -> None:
    family = architecture.replace("ForSequenceClassification", "").removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(num_labels=1).to_dict()
    config["architectures"] = [architecture]
    want = encoder_config.encoder_fields(config)
    for key in [*encoder_config.DEFAULTS, "pad_token_id"]:
        fewer = {k: v for k, v in config.items() if k != key}
        assert encoder_config.encoder_fields(fewer) == want, key


def test_the_activation_of_gemma_is_named_by_its_own_key() -> None:
    """Its older files have both, and transformers reads this one."""
    config = full("Gemma2ForCausalLM") | {"hidden_act": "silu"}
    assert effective(config).hidden_act == "gelu_tanh"


def test_two_spellings_that_differ_are_refused() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = full("Qwen2ForCausalLM")
    with pytest.raises(UnsupportedModelError, match="beside rope_parameters"):
        model_fields(config | {"rope_scaling": yarn})
    same = config | {"rope_scaling": {"type": "default"}}
    assert effective(same) == effective(config)
    both = config | {"rope_scaling": yarn, "rope_parameters": config["rope_parameters"] | yarn}
    assert effective(both).rope_scaling == yarn


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "linear"}, "linear needs factor"),
        ({"rope_type": "linear", "factor": 0}, r"factor is '0': expected a number above 0"),
        ({"rope_type": "yarn", "factor": "x"}, r"factor is 'x'"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8}, "needs long_factor"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [0.0] * 8},
            "long_factor: expected a list of numbers above 0",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 7},
            "long_factor has 7 values, but 8 pairs",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_scaling_without_its_numbers_is_refused(scaling: dict[str, Any], words: str) -> None:
    config = full("LlamaForCausalLM")  # heads of 16
    del config["rope_parameters"]
    with pytest.raises(ConfigError, match=rf"model\.rope_scaling.*{words}"):
        effective(config | {"rope_scaling": scaling})


@pytest.mark.parametrize("architecture", FAMILIES)
def test_both_spellings_of_rotary_settings_say_the_same(architecture: str) -> None:
    config = full(architecture)
    rope = config.pop("rope_parameters")
    sets = rope if "full_attention" in rope else {"full_attention": rope}
    config["rope_theta"] = sets["full_attention"]["rope_theta"]
    if "sliding_attention" in sets:
        config["rope_local_base_freq"] = sets["sliding_attention"]["rope_theta"]
    old = config | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    new = config | {"rope_parameters": rope}
    assert effective(config) == effective(new)
    assert effective(old).rope_scaling == {"rope_type": "linear", "factor": 4.0}
    assert effective(old).rope_theta == effective(new).rope_theta


@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_unknown_setting_is_refused(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"attention_sinks=4.*implementation=transfor"):
        model_fields(full(architecture) | {"attention_sinks": 4})
    assert model_fields(full(architecture) | {"attention_sinks": None})


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("LlamaForCausalLM", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("LlamaForCausalLM", {"pretraining_tp": 2}, "pretraining_tp=2"),
        ("LlamaForCausalLM", {"quantization_config": {"quant_method": "awq"}}, "bits .* missing"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "proportional"}},
            "rope_scaling 'proportional'",
        ),
        (
            "Qwen2ForCausalLM",
            {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
            "mrope_section",
        ),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"] * 7}, "chunked_attention"),
        ("Phi3ForCausalLM", {"full_attn_mod": 2}, "full_attn_mod=2"),
        ("NoSuchForCausalLM", {"quantization_config": {"quant_method": "x"}}, "'x' is not"),
    ],
)
def test_settings_that_the_decoder_lacks(
    architecture: str, changes: dict[str, Any], words: str
) -> None:
    config = full(architecture) if is_native(architecture) else {"architectures": [architecture]}
    with pytest.raises(UnsupportedModelError, match=words):
        model_fields(config | changes)


def test_no_architecture_lists_the_native_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"native ones are .*LlamaForCausalLM"):
        model_fields({"model_type": "llama"})


def test_a_foreign_architecture_gives_what_all_share() -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 9, "n_positions": 32}
    assert model_fields(config, {"eos_token_id": 3}) == {
        "architecture": "GPT2LMHeadModel",
        "vocab_size": 9,
        "max_position_embeddings": 32,
        "eos_token_ids": [3],
    }


def test_a_native_architecture_on_foreign_code_too() -> None:
    fields = model_fields(full("Qwen3ForCausalLM") | {"attention_sinks": 4}, native=False)
    assert set(fields) == {
        "architecture",
        "vocab_size",
        "max_position_embeddings",
        "eos_token_ids",
    }


def test_end_tokens_of_generation_come_first() -> None:
    config = full("LlamaForCausalLM", eos_token_id=[5, 6])
    assert model_fields(config, {"eos_token_id": [9, 5]})["eos_token_ids"] == [9, 5, 6]
    assert model_fields(config, {"eos_token_id": 7})["eos_token_ids"] == [7, 5, 6]


def test_gemma3_with_a_vision_tower_is_read_as_its_text_model() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config: dict[str, Any] = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "text_config": {**text, **scaling, "model_type": "gemma3_text"},
        "vision_config": {"hidden_size": 1152},
    }
    got = effective(config)
    sizes = text | {"vocab_size": 262208, "num_attention_heads": 8, "sliding_window": 1024}
    whole = full("Gemma3ForCausalLM", **sizes)
    whole["rope_parameters"]["full_attention"] |= {"factor": 8.0, "rope_type": "linear"}
    want = effective(whole | {"eos_token_id": [1, 106]})
    assert got == want
    assert (got.num_attention_heads, got.head_dim, got.rope_local_theta) == (8, 256, 10000.0)
    config["text_config"] |= {"eos_token_id": 1}
    assert effective(config).eos_token_ids == [1, 106]
    del config["eos_token_id"], config["text_config"]["eos_token_id"]
    assert effective(config).eos_token_ids == [1]
    assert got.layer_types is not None
    assert got.layer_types[:6] == ["sliding_attention"] * 5 + ["full_attention"]


PUBLISHED: dict[str, dict[str, Any]] = {
    "phi-3-mini-128k": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "su", "long_factor": [1.5] * 48, "short_factor": [1.1] * 48},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2",
        "use_cache": True,
        "vocab_size": 32064,
    },
    "smollm2": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 49152,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_transformers_4_are_read(name: str) -> None:
    config = effective(PUBLISHED[name])
    assert config.vocab_size == PUBLISHED[name]["vocab_size"]
    assert config.max_model_len == PUBLISHED[name]["max_position_embeddings"]


def test_phi3_keeps_its_two_lists_of_divisors() -> None:
    scaling = effective(PUBLISHED["phi-3-mini-128k"]).rope_scaling
    assert scaling is not None
    assert set(scaling) == {
        "rope_type",
        "long_factor",
        "short_factor",
        "original_max_position_embeddings",
    }
    assert scaling["rope_type"] == "longrope"
