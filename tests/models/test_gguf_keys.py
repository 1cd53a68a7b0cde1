"""Keys of a GGUF's metadata: each one of an architecture changes the config, is known to change
nothing, or is refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import gguf
import pytest

from vllm_di.errors import CheckpointError, UnsupportedModelError
from vllm_di.models.gguf_config import CLASSES, COMMON, generation_config, hf_config
from vllm_di.models.gguf_keys import IRRELEVANT
from vllm_di.models.hf_config import model_fields
from vllm_di.models.rope import cos_sin_table

KEYS = {
    value.removeprefix("{arch}.")
    for group in vars(gguf.constants.Keys).values()
    if inspect.isclass(group)
    for name, value in vars(group).items()
    if isinstance(value, str) and value.startswith("{arch}.") and not name.startswith("__")
} | {"rope.scale_linear", "made_up"}
VALUES: dict[str, list[Any]] = {
    "rope.scaling.type": ["linear", "yarn", "longrope", "su"],
    "attention.causal": [False],
    "expert_weights_norm": [False],
    "expert_gating_func": [2, 0.37, "x"],
    "attention.sliding_window_pattern": [3, [0, 0, 1, 1], "x"],
}
OTHERS: list[Any] = [37, 0.37, [1, 0, 1, 0], "x"]


def facts(arch: str, **more: Any) -> dict[str, Any]:
    base = {
        "embedding_length": 64,
        "feed_forward_length": 96,
        "block_count": 4,
        "context_length": 4096,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    if arch == "qwen3moe":
        base |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    if arch in ("gemma2", "gemma3"):
        base |= {"attention.sliding_window": 16}
    if arch == "granite":
        base |= {"logit_scale": 2.0}
    named = {f"{arch}.{key}": value for key, value in (base | more).items()}
    return {"general.architecture": arch, **named}


def fields(metadata: dict[str, Any]) -> dict[str, Any]:
    return model_fields(
        hf_config(metadata, vocab_size=320, tied=True, vector=lambda name: None),
        generation_config(metadata),
    )


YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 1024,
}


def effect(arch: str, key: str, value: Any) -> str:
    """What a key does: ``changes`` the config, ``nothing``, or the message that refuses it."""
    for base in ({}, YARN):
        before = facts(arch, **base)
        if before.get(f"{arch}.{key}") == value:
            return "changes"  # it is what another value is compared with
        try:
            after = fields(before | {f"{arch}.{key}": value})
        except (UnsupportedModelError, CheckpointError) as error:
            return str(error)
        except (TypeError, ValueError):  # of a foreign type
            return "changes"
        if after != fields(before):
            return "changes"
    return "nothing"


@pytest.mark.parametrize("arch", CLASSES)
def test_no_key_is_ignored(arch: str) -> None:
    assert len(KEYS) > 80
    ours = {key: name for name, key in COMMON.items()}
    for key in sorted(KEYS - IRRELEVANT - {"rope.scaling.finetuned"}):
        for value in VALUES.get(key, OTHERS):
            told = effect(arch, key, value)
            assert told != "nothing", f"{arch}.{key}={value!r} is ignored"
            last = key.rpartition(".")[2]  # a message may name the key of config.json instead
            assert told == "changes" or last in told or ours.get(key, last) in told, (key, told)


@pytest.mark.parametrize("arch", CLASSES)
def test_what_changes_nothing_is_taken(arch: str) -> None:
    more = {
        "vocab_size": 320,
        "tensor_data_layout": "Meta AI original pth",
        "attention.causal": True,
        "attention.value_length": 16,
        "attention.key_length": 16,
        "attention.key_length_swa": 16,
        "attention.max_alibi_bias": 0.0,
        "pooling_type": 0,
        "nextn_predict_layers": 0,
        "rope.dimension_sections": [0, 0, 0, 0],
        "rope.scaling.type": "none",
        "rope.scaling.finetuned": True,
    }
    assert fields(facts(arch, **more)) == fields(facts(arch))


def test_a_file_of_another_type_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'adapter': the file is no model"):
        fields(facts("llama") | {"general.type": "adapter"})


def scaling(**more: Any) -> dict[str, Any] | None:
    named = {f"rope.{key.replace('__', '.')}": value for key, value in more.items()}
    return fields(facts("qwen2", **named)).get("rope_scaling")


def test_rotary_scaling_is_carried() -> None:
    yarn: dict[str, Any] = {
        "scaling__type": "yarn",
        "scaling__factor": 4.0,
        "scaling__original_context_length": 1024,
    }
    kept = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert scaling(**yarn) == kept
    betas = yarn | {"scaling__yarn_beta_fast": 4.0, "scaling__yarn_beta_slow": 2.0}
    assert scaling(**betas) == kept | {"beta_fast": 4.0, "beta_slow": 2.0}
    direct = yarn | {"scaling__yarn_attn_factor": 1.5}
    assert scaling(**direct) == kept | {"attention_factor": 1.5}
    linear = {"rope_type": "linear", "factor": 4.0}
    assert scaling(scaling__type="linear", scaling__factor=4.0) == linear
    assert scaling(scaling__factor=4.0) == linear, "the kind is linear unless said"
    assert scaling(scale_linear=4.0) == linear
    assert scaling(scale_linear=8.0, scaling__factor=4.0) == linear
    assert scaling(scaling__type="none", scaling__factor=4.0) is None
    assert scaling(scaling__type="linear") is None


def test_attn_factor_multiplies_yarns_own_amplitude() -> None:
    def table(scaling: dict[str, Any] | None) -> Any:
        return cos_sin_table(
            rotary_dim=16,
            num_positions=50,
            theta=10000.0,
            scaling=scaling,
            max_position_embeddings=4096,
        )

    yarn: dict[str, Any] = {
        "scaling__type": "yarn",
        "scaling__factor": 4.0,
        "scaling__original_context_length": 1024,
    }
    plain, scaled = table(scaling(**yarn)), table(scaling(**yarn, scaling__attn_factor=1.25))
    assert float((scaled - 1.25 * plain).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"scaling__type": "linear", "scaling__attn_factor": 1.25}, "attn_factor"),
        ({"scaling__attn_factor": 1.25}, "attn_factor"),
        ({"scaling__type": "yarn", "scaling__yarn_ext_factor": 0.5}, r"ext_factor.*only 1.0"),
        ({"scaling__type": "yarn", "scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"scaling__type": "linear", "scaling__yarn_beta_fast": 4.0}, "yarn_beta_fast"),
        ({"scaling__alpha": 1000.0}, "alpha"),
        ({"scaling__type": "longrope"}, "rope_factors_long.weight or .* is missing"),
        ({"dimension_sections": [8, 8, 8, 0]}, r"qwen2\.rope\.dimension_sections"),
    ],
)
def test_rotary_scaling_that_cannot_be_kept_is_refused(more: dict[str, Any], match: str) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError), match=match):
        scaling(**more)


def test_granite_without_rotary_embedding_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"finetuned is False.*only True"):
        fields(facts("granite", **{"rope.scaling.finetuned": False}))


def test_gemmas_windows_follow_the_files_pattern() -> None:
    def types(**more: Any) -> Any:
        named = {f"attention.{key}": value for key, value in more.items()}
        return fields(facts("gemma3", **named)).get("layer_types")

    full, sliding = "full_attention", "sliding_attention"
    assert types() == [sliding] * 4  # every sixth is full
    assert types(sliding_window_pattern=2) == [sliding, full] * 2
    assert types(sliding_window_pattern=[True, False, False, True]) == [
        sliding,
        full,
        full,
        sliding,
    ]
    assert types(sliding_window=0) is None, "no window at all, where the class has one by default"
    with pytest.raises(CheckpointError, match="has 3 entries for 4 layers"):
        types(sliding_window_pattern=[True, False, True])


@pytest.mark.parametrize("key", ["embedding_length", "block_count", "attention.head_count"])
def test_a_missing_size_is_named(key: str) -> None:
    broken = facts("llama")
    del broken[f"llama.{key}"]
    with pytest.raises(CheckpointError, match=rf"llama\.{key} is missing"):
        fields(broken)


def test_sampling_values_become_a_generation_config() -> None:
    metadata = {
        "tokenizer.ggml.eos_token_id": 7,
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.05,
        "general.sampling.mirostat": 2,
    }
    assert generation_config(metadata) == {
        "eos_token_id": [7],
        "temperature": 0.6,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "mirostat": 2,
    }
