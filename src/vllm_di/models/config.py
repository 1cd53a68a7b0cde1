"""What a model's node may say. Keys that are null come from the checkpoint."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec

from vllm_di.errors import ConfigError

Count = Annotated[int, msgspec.Meta(ge=1)]
Size = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]

REQUIRED = (
    "architecture",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
SWITCHES = (
    "tie_word_embeddings",
    "attention_bias",
    "attention_output_bias",
    "mlp_bias",
    "qk_norm",
    "post_norms",
    "fused_projections",
)
"""Off where nothing is said."""
SCALING_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""Kind of rotary scaling to the keys that it cannot do without."""
SCALING_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
)
"""Of ``rope_scaling``; another divides by zero, or turns by angles that are no numbers."""


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decoder's architecture, in the words of Hugging Face configs, and how it is to run."""

    path: str | None = None
    implementation: Literal["auto", "native", "transformers"] = "auto"
    dtype: str = "auto"
    max_model_len: Count | None = None
    layers: tuple[Size, Count | None] | None = None

    architecture: str | None = None
    vocab_size: Count | None = None
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count | None = None
    rms_norm_eps: Annotated[float, msgspec.Meta(ge=0)] | None = None
    hidden_act: Literal["silu", "gelu_tanh"] | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    attention_output_bias: bool | None = None
    mlp_bias: bool | None = None
    eos_token_ids: list[Size] | None = None
    bos_token_id: Size | None = None

    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_local_theta: Positive | None = None
    partial_rotary_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    no_rope_layers: list[Size] | None = None

    sliding_window: Count | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    attention_scale: Positive | None = None
    qk_norm: bool | None = None
    norm_offset: float | None = None
    post_norms: bool | None = None
    embedding_multiplier: float | None = None
    residual_multiplier: float | None = None
    logits_scaling: Positive | None = None
    fused_projections: bool | None = None

    num_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Count | None = None
    norm_topk_prob: bool | None = None
    dense_layers: list[Size] | None = None

    @property
    def span(self) -> range:
        """The layers that run here."""
        count = self.num_hidden_layers or 0
        first, end = self.layers or (0, count)
        return range(first, count if end is None else end)

    def complete(self) -> DecoderConfig:
        """With every default filled in. Raises ConfigError for what is missing or does not fit."""
        required = (*REQUIRED, "num_experts_per_tok") if self.num_experts else REQUIRED
        missing = [name for name in required if getattr(self, name) is None]
        if missing:
            raise ConfigError(
                f"model: {', '.join(missing)} must be set; give a checkpoint with model.path, "
                "or take a model option that carries its architecture"
            )
        layers = self.num_hidden_layers or 0
        head_dim = self._check_heads()
        limit = self._check_length()
        self._check_layers()
        types = self.layer_types or ["full_attention"] * layers
        if len(types) < layers:
            raise ConfigError(
                f"model.layer_types has {len(types)} entries for {layers} layers "
                "(model.num_hidden_layers)"
            )
        if "sliding_attention" in types[:layers] and self.sliding_window is None:
            raise ConfigError("model.layer_types has sliding_attention: set model.sliding_window")
        if (self.num_experts_per_tok or 0) > (self.num_experts or self.num_experts_per_tok or 0):
            raise ConfigError(
                f"model.num_experts_per_tok ({self.num_experts_per_tok}) is above "
                f"model.num_experts ({self.num_experts})"
            )
        return msgspec.structs.replace(
            self,
            max_model_len=self.max_model_len or limit,
            num_key_value_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=head_dim,
            rms_norm_eps=1e-6 if self.rms_norm_eps is None else self.rms_norm_eps,
            hidden_act=self.hidden_act or "silu",
            eos_token_ids=self.eos_token_ids or [],
            rope_theta=self.rope_theta or 10000.0,
            partial_rotary_factor=self.partial_rotary_factor or 1.0,
            no_rope_layers=self.no_rope_layers or [],
            layer_types=types[:layers],
            norm_offset=self.norm_offset or 0.0,
            moe_intermediate_size=self.moe_intermediate_size or self.intermediate_size,
            norm_topk_prob=self.norm_topk_prob is not False,
            dense_layers=self.dense_layers or [],
            # factors of one are not applied at all
            embedding_multiplier=_factor(self.embedding_multiplier),
            residual_multiplier=_factor(self.residual_multiplier),
            logits_scaling=_factor(self.logits_scaling),
            **{name: bool(getattr(self, name)) for name in SWITCHES},
        )

    def _check_heads(self) -> int:
        """-> elements of a head."""
        heads, hidden = self.num_attention_heads or 0, self.hidden_size or 0
        kv_heads = self.num_key_value_heads or heads
        if heads % kv_heads:
            raise ConfigError(
                f"model.num_key_value_heads ({kv_heads}) must divide "
                f"model.num_attention_heads ({heads})"
            )
        if self.head_dim is None and hidden % heads:
            raise ConfigError(
                f"model.num_attention_heads ({heads}) must divide model.hidden_size ({hidden}), "
                "or set model.head_dim"
            )
        head_dim = self.head_dim or hidden // heads
        rotary = int(head_dim * (self.partial_rotary_factor or 1.0))
        if rotary % 2 or not rotary:
            raise ConfigError(
                f"model.head_dim ({head_dim}) times model.partial_rotary_factor must be even: "
                f"rotary embedding turns pairs, and {rotary} is not"
            )
        self._check_scaling(rotary // 2)
        return head_dim

    def _check_scaling(self, pairs: int) -> None:
        scaling = self.rope_scaling or {}
        kind = str(scaling.get("rope_type", scaling.get("type", "default")))
        missing = [name for name in SCALING_NEEDS.get(kind, ()) if scaling.get(name) is None]
        if missing:
            raise ConfigError(f"model.rope_scaling: {kind} needs {', '.join(missing)}")
        for name in SCALING_NUMBERS:
            if (value := scaling.get(name)) is not None and not _is_positive(value):
                raise ConfigError(
                    f"model.rope_scaling.{name} is {str(value)[:80]!r}: expected a number above 0"
                )
        for name in ("short_factor", "long_factor"):
            if (factors := scaling.get(name)) is None:
                continue
            if not isinstance(factors, list) or not all(map(_is_positive, factors)):
                raise ConfigError(f"model.rope_scaling.{name}: expected a list of numbers above 0")
            if len(factors) != pairs:
                raise ConfigError(
                    f"model.rope_scaling.{name} has {len(factors)} values, "
                    f"but {pairs} pairs are rotated"
                )

    def _check_layers(self) -> None:
        span, count = self.span, self.num_hidden_layers or 0
        if not span or span.stop > count:
            raise ConfigError(
                f"model.layers [{span.start}, {span.stop}]: the model has the layers [0, {count}] "
                "(model.num_hidden_layers); give [first, end], the end not included"
            )

    def _check_length(self) -> int:
        """-> the longest context by default. YaRN may be asked for more than the model's own."""
        limit = largest = self.max_position_embeddings or 0
        scaling = self.rope_scaling or {}
        if scaling.get("rope_type") == "yarn":
            old = scaling.get("original_max_position_embeddings") or limit
            largest = max(limit, int(old * float(scaling.get("factor") or 1)))
        if (self.max_model_len or 0) > largest:
            raise ConfigError(
                f"model.max_model_len ({self.max_model_len}) is above what the model was made "
                f"for: model.max_position_embeddings is {limit}"
            )
        return limit


def _factor(value: float | None) -> float | None:
    return None if value == 1.0 else value


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf
