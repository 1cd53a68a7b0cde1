"""From a Hugging Face ``config.json`` to the native decoder's fields, one function for each family.

A setting that would change the result and that the decoder does not know is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from vllm_di.components.loader.scheme import read_scheme
from vllm_di.errors import CheckpointError, UnsupportedModelError, VllmDiError
from vllm_di.models.encoder_config import ENCODERS, encoder_fields
from vllm_di.models.hf_settings import (
    Config,
    refuse,
    refuse_unknown,
    shorten,
    with_defaults,
)

Fields = dict[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}


MOST_LAYERS = 10_000
"""Of a config that is believed; lists as long as that are made from it."""
HOW_TO_RUN = frozenset(["path", "implementation", "dtype", "max_model_len", "layers"])
"""Keys of a model's node that are no part of its architecture."""


def is_native(architecture: str) -> bool:
    """True when the native decoder has this architecture."""
    return architecture in FAMILIES


def architecture_of(config: Config) -> str:
    """The class name in ``architectures``. Raises UnsupportedModelError where there is none."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        what = "names no architecture" if not names else f"has architectures={shorten(names)}"
        raise UnsupportedModelError(
            f"config.json {what}; native ones are {', '.join(sorted(FAMILIES))}"
        )
    return names[0]


def read_fields(
    config: Config, generation: Config | None, *, own: Collection[str] | None, native: bool
) -> Fields:
    """``own_fields`` where ``own`` has keys, else ``model_fields``; a config that is not of the
    shape that Hugging Face writes is a CheckpointError."""
    try:
        config = with_head(config)
        if own is not None:
            return own_fields(config, generation, own)
        if native and architecture_of(config) in ENCODERS:
            read_scheme(config)
            return encoder_fields(config)
        return model_fields(config, generation, native=native)
    except VllmDiError:
        raise
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        raise CheckpointError(
            f"config.json holds what no config of {shorten(config.get('architectures'))} does: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error


def with_head(config: Config) -> Config:
    """``config`` with the name of the causal model, where it names one of ours that was saved
    without its head, as embedding models are."""
    names = config.get("architectures")
    found = HEADLESS.get(names[0]) if isinstance(names, list) and names else None
    return config if found is None else {**config, "architectures": [found]}


def own_fields(config: Config, generation: Config | None, keys: Collection[str]) -> Fields:
    """Fields for a class that is none of ours: ``config.json``'s values of the names in ``keys``,
    and what ``model_fields`` reads. A setting that the native decoder lacks is refused unless the
    class has a key for it. Raises UnsupportedModelError."""
    named = set(keys) - HOW_TO_RUN
    fields = {key: config[key] for key in named if config.get(key) is not None}
    if is_native(architecture_of(config)):
        return fields | model_fields(config, generation, known=keys)
    return fields | _shared(with_defaults(config), generation or {})


def model_fields(
    config: Config,
    generation: Config | None = None,
    *,
    native: bool = True,
    known: Collection[str] = (),
) -> Fields:
    """Fields of DecoderConfig for a checkpoint. For a foreign architecture, or with ``native``
    false, only those that transformers' code shares. ``known`` are further keys of ``config`` that
    the model understands.

    Raises UnsupportedModelError for a config without an architecture, or with settings that the
    native decoder lacks.
    """
    name = architecture_of(config)
    read_scheme(config)  # what cannot be read is refused before anything is built
    if name == "Gemma3ForConditionalGeneration" and "text_config" in config and native:
        config = _text_part(config)
    name = config["architectures"][0]
    config = with_defaults(config)
    if not native or name not in FAMILIES:
        return _shared(config, generation or {})
    refuse_unknown(config, known)
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int | None) or not 0 < (layers or 1) <= MOST_LAYERS:
        raise CheckpointError(
            f"config.json sets num_hidden_layers={shorten(layers)}; expected 1 to {MOST_LAYERS}"
        )
    fields = {"architecture": name, **_token_ids(config, generation or {})}
    fields |= _common(config) | FAMILIES[name](config)
    return {name: value for name, value in fields.items() if value is not None}


def _shared(config: Config, generation: Config) -> Fields:
    """What every architecture has."""
    fields = {
        "architecture": architecture_of(config),
        **_token_ids(config, generation),
        "vocab_size": config.get("vocab_size"),
        "max_position_embeddings": _first(
            config, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length"
        ),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _text_part(config: Config) -> Config:
    """The text part of a multimodal Gemma 3. Settings of the outer config hold for it too, and what
    ends an answer there ends one here: transformers 5 writes its class's default beside it."""
    shared, text = ("bos_token_id", "eos_token_id", "tie_word_embeddings"), config["text_config"]
    outer = {key: config[key] for key in shared if config.get(key) is not None}
    both = {**outer, **text, "architectures": ["Gemma3ForCausalLM"]}
    ends = [*_listed_ids(config.get("eos_token_id")), *_listed_ids(text.get("eos_token_id"))]
    return both | {"eos_token_id": ends} if ends else both


def _listed_ids(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _token_ids(config: Config, generation: Config) -> Fields:
    eos: list[int] = []
    for source in (generation, config):
        ids = source.get("eos_token_id")
        for token in _listed_ids(ids):
            if token is None or token in eos:
                continue
            if isinstance(token, bool) or not isinstance(token, int) or abs(token) >= 2**31:
                raise CheckpointError(f"eos_token_id is {ids!r}: expected token ids")
            eos.append(token)
    return {"eos_token_ids": eos, "bos_token_id": config.get("bos_token_id")}


def _first(config: Config, *names: str) -> Any:
    return next((config[n] for n in names if config.get(n) is not None), None)


def _common(config: Config) -> Fields:
    activation = _first(config, "hidden_activation", "hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act {activation!r} is not known; known are {', '.join(ACTIVATIONS)}"
        )
    fields: Fields = {
        name: config.get(name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "tie_word_embeddings",
        )
    }
    return fields | {"hidden_act": ACTIVATIONS[activation]} | _rope(config)


ROPE_KEYS: dict[str, frozenset[str]] = {
    kind: frozenset(keys.split())
    for kind, keys in {
        "default": "",
        "linear": "factor",
        "dynamic": "factor",
        "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
        "yarn": "factor original_max_position_embeddings attention_factor beta_fast beta_slow "
        "mscale mscale_all_dim truncate",
        "longrope": "factor original_max_position_embeddings attention_factor short_factor "
        "long_factor",
    }.items()
}
"""Keys of each kind of rotary scaling, besides ROPE_SHARED."""
ROPE_SHARED = ("rope_theta", "partial_rotary_factor", "type", "rope_type")


def _rope(config: Config) -> Fields:
    """transformers 5 keeps theta and scaling in ``rope_parameters``, 4 in two keys."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _check_spellings(config)
    if _is_nested(rope):
        local = rope.get("sliding_attention") or {}
        if _kind(local) != "default":
            raise UnsupportedModelError(
                f"{config['architectures'][0]} with scaled rotary embedding "
                f"({_kind(local)}) in its sliding layers is not supported"
            )
        rope = rope.get("full_attention") or {}
    kind = _kind(rope)
    theta = _first(rope, "rope_theta") or config.get("rope_theta")
    partial = _first(rope, "partial_rotary_factor") or config.get("partial_rotary_factor")
    fields: Fields = {"rope_theta": theta, "partial_rotary_factor": partial}
    if kind not in ROPE_KEYS:
        raise UnsupportedModelError(
            f"rope_scaling {kind!r} is not known; known are {', '.join(ROPE_KEYS)}"
        )
    scaling = {k: v for k, v in rope.items() if k not in ROPE_SHARED and v is not None}
    if foreign := set(scaling) - ROPE_KEYS[kind]:
        raise UnsupportedModelError(
            f"rope_scaling {kind!r} with {', '.join(sorted(foreign))} is not supported"
        )
    if kind != "default":
        old = config.get("original_max_position_embeddings")
        if old and "original_max_position_embeddings" in ROPE_KEYS[kind]:
            scaling["original_max_position_embeddings"] = old
        fields["rope_scaling"] = scaling | {"rope_type": kind}
    return fields


def _is_nested(rope: Config) -> bool:
    """Whether it has one set for each kind of layer."""
    return any(isinstance(value, Mapping) for value in rope.values())


def _check_spellings(config: Config) -> None:
    """Raises UnsupportedModelError where the older key asks for what the newer one does not, as
    when somebody adds a scaling to a newer file: transformers takes the older one then, without
    the theta of the newer one."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if not new or not old:
        return
    rope = new.get("full_attention") or {} if _is_nested(new) else new
    wanted = {k: v for k, v in old.items() if k not in ("type", "rope_type") and v is not None}
    if _kind(old) != _kind(rope) or any(rope.get(k) != v for k, v in wanted.items()):
        raise UnsupportedModelError(
            f"config.json has rope_scaling={shorten(old)} beside "
            f"rope_parameters={shorten(new)}, which says another thing; leave one of them"
        )


def _kind(rope: Config) -> str:
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    return "longrope" if kind == "su" else kind


def _sliding(config: Config) -> Fields:
    """A window in every layer, unless the config lists them."""
    return _listed(config, ["sliding_attention"] * int(config["num_hidden_layers"]))


def _listed(config: Config, types: list[str]) -> Fields:
    """A window in the layers that the config lists, or else in those of ``types``."""
    types = list(config.get("layer_types") or types)
    if foreign := set(types) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{config['architectures'][0]} with layers of type {', '.join(sorted(foreign))} is "
            "not supported (full_attention and sliding_attention are)"
        )
    window = config.get("sliding_window")
    if window is None or "sliding_attention" not in types:
        return {}
    return {"sliding_window": window, "layer_types": types}


def _llama(config: Config) -> Fields:
    refuse(config, pretraining_tp=1)
    bias = config.get("attention_bias")
    return {
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": config.get("mlp_bias"),
    }


def _mixed_window(config: Config) -> Fields:
    """Qwen: a window only where ``use_sliding_window`` says so, from ``max_window_layers`` on."""
    if not config.get("use_sliding_window"):
        return {}
    layers, after = int(config["num_hidden_layers"]), int(config.get("max_window_layers") or 0)
    return _listed(
        config, ["full_attention" if i < after else "sliding_attention" for i in range(layers)]
    )


def _qwen2(config: Config) -> Fields:
    return _mixed_window(config) | {"attention_bias": True, "attention_output_bias": False}


def _qwen3(config: Config) -> Fields:
    bias = config.get("attention_bias")
    return _mixed_window(config) | {
        "attention_bias": bias,
        "attention_output_bias": bias,
        "qk_norm": True,
    }


def _qwen3_moe(config: Config) -> Fields:
    bias = config.get("attention_bias")
    layers, step = int(config["num_hidden_layers"]), int(config.get("decoder_sparse_step") or 1)
    dense = set(config.get("mlp_only_layers") or [])
    dense |= {i for i in range(layers) if (i + 1) % step}
    return (_sliding(config) if config.get("use_sliding_window") else {}) | {
        "attention_bias": bias,
        "attention_output_bias": bias,
        "qk_norm": True,
        "num_experts": _first(config, "num_experts", "num_local_experts") or 128,
        "num_experts_per_tok": config.get("num_experts_per_tok"),
        "moe_intermediate_size": config.get("moe_intermediate_size"),
        "norm_topk_prob": bool(config.get("norm_topk_prob")),
        "dense_layers": sorted(dense),
    }


def _mixtral(config: Config) -> Fields:
    return _sliding(config) | {
        "num_experts": _first(config, "num_local_experts", "num_experts"),
        "num_experts_per_tok": config.get("num_experts_per_tok"),
        "norm_topk_prob": True,
    }


def _smollm3(config: Config) -> Fields:
    bias = config.get("attention_bias")
    layers = int(config["num_hidden_layers"])
    rope = config.get("no_rope_layers")  # 1 where rotary is used, in spite of the name
    if rope is None:
        interval = int(config.get("no_rope_layer_interval") or 4)
        rope = [int((i + 1) % interval != 0) for i in range(layers)]
    types = ["full_attention" if used else "sliding_attention" for used in rope[:layers]]
    window = _listed(config, types) if config.get("use_sliding_window") else {}
    return window | {
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": config.get("mlp_bias"),
        "no_rope_layers": [i for i, used in enumerate(rope) if not used],
    }


def _granite(config: Config) -> Fields:
    return _llama(config) | {
        "attention_scale": config.get("attention_multiplier") or 1.0,
        "embedding_multiplier": config.get("embedding_multiplier"),
        "residual_multiplier": config.get("residual_multiplier"),
        "logits_scaling": config.get("logits_scaling"),
    }


def _phi3(config: Config) -> Fields:
    refuse(config, interpolate_factor=1, full_attn_mod=1)
    return _sliding(config) | {"fused_projections": True}


def _gemma(config: Config) -> Fields:
    bias = config.get("attention_bias")
    refuse(config, use_bidirectional_attention=False)
    return {
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_multiplier": float(config["hidden_size"]) ** 0.5,
        "attention_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
        "attention_bias": bias,
        "attention_output_bias": bias,
    }


def _gemma2(config: Config) -> Fields:
    layers = int(config["num_hidden_layers"])
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return _gemma(config) | _listed(config, types)


def _gemma3(config: Config) -> Fields:
    layers = int(config["num_hidden_layers"])
    pattern = int(_first(config, "sliding_window_pattern", "_sliding_window_pattern") or 6)
    types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    rope = config.get("rope_parameters") or {}
    local = (rope.get("sliding_attention") or {}).get("rope_theta")
    return (
        _gemma(config)
        | _listed(config, types)
        | {
            "qk_norm": True,
            "rope_local_theta": local or config.get("rope_local_base_freq") or 10000.0,
        }
    )


FAMILIES: dict[str, Callable[[Config], Fields]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _sliding,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "SmolLM3ForCausalLM": _smollm3,
    "GraniteForCausalLM": _granite,
    "Phi3ForCausalLM": _phi3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}

HEADLESS = {name.replace("ForCausalLM", "Model"): name for name in FAMILIES} | {
    "Gemma3TextModel": "Gemma3ForCausalLM"
}
"""Names of the families' classes without a head."""
