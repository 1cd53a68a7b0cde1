"""Which keys of a GGUF's metadata a model of an architecture may have.

Each ``{arch}.*`` key is read by ``gguf_config``, or known to change nothing, or refused by name.
Names: ggml-org/ggml, docs/gguf.md, and llama.cpp's src/llama-arch.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_di.errors import UnsupportedModelError

Facts = Mapping[str, Any]

READ = frozenset(
    [
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "context_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.scale",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "embedding_scale",
        "residual_scale",
        "logit_scale",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    ]
)
"""By ``gguf_config``, which writes them to a ``config.json``; what a family does not have is
refused when that is read."""
EXPERTS = ("expert_count", "expert_used_count", "expert_feed_forward_length")
READ_BY: dict[str, frozenset[str]] = {
    "llama": frozenset(["attention.sliding_window", *EXPERTS]),
    "qwen3moe": frozenset(EXPERTS),
    "phi3": frozenset(["attention.sliding_window"]),
    "gemma2": frozenset(["attention.sliding_window", "attention.sliding_window_pattern"]),
    "gemma3": frozenset(
        ["attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"]
    ),
}
IRRELEVANT = frozenset(["vocab_size", "tensor_data_layout"])
"""The embedding says how many tokens there are; the layout is that of a long-gone converter."""
ONLY: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (1.0, 0.0),
    "expert_gating_func": (1, 0),  # softmax
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_ext_factor": (1.0,),
}
"""Keys whose listed value is what the decoder does anyway."""
ONLY_BY = {("granite", "rope.scaling.finetuned"): (True,)}  # False: no rotary embedding at all
NEUTRAL: tuple[Any, ...] = (None, False, 0, "")


def refuse_unknown_keys(facts: Facts, arch: str) -> None:
    """Raises UnsupportedModelError for a key that might change the result and is not understood."""
    kind = facts.get("general.type")
    if kind not in (None, "model"):
        raise UnsupportedModelError(f"general.type is {kind!r}: the file is no model")
    for full, value in facts.items():
        key = full.removeprefix(f"{arch}.")
        if key == full or key in READ or key in IRRELEVANT or key in READ_BY.get(arch, ()):
            continue
        allowed = ONLY_BY.get((arch, key), ONLY.get(key))
        if value in allowed if allowed is not None else _is_neutral(facts, arch, key, value):
            continue
        expected = f" (only {allowed[0]!r})" if allowed else ""
        raise UnsupportedModelError(
            f"{full} is {_short(value)}, which the native decoder does not know{expected}; "
            "take the model's safetensors"
        )


def _is_neutral(facts: Facts, arch: str, key: str, value: Any) -> bool:
    if key == "attention.sliding_window":  # as wide as the context: no window
        return not value or value >= facts.get(f"{arch}.context_length", float("inf"))
    if key.endswith("_swa"):  # of the sliding layers: the same as of all
        return bool(value == facts.get(f"{arch}.{key.removesuffix('_swa')}"))
    if isinstance(value, list):
        return all(item in NEUTRAL for item in value)
    return value in NEUTRAL


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
