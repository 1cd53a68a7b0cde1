"""What a model's node may say. Keys that are null come from the checkpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from vllm_di.errors import ConfigError

Count = Annotated[int, msgspec.Meta(ge=1)]
Size = Annotated[int, msgspec.Meta(ge=0)]

REQUIRED = (
    "architecture",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decoder's architecture, in the words of Hugging Face configs, and how it is to run."""

    path: str | None = None
    implementation: Literal["auto", "native", "transformers"] = "auto"
    dtype: str = "auto"
    max_model_len: Count | None = None

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

    rope_theta: Annotated[float, msgspec.Meta(gt=0)] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_local_theta: Annotated[float, msgspec.Meta(gt=0)] | None = None
    partial_rotary_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    no_rope_layers: list[Size] | None = None

    sliding_window: Count | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    attention_scale: Annotated[float, msgspec.Meta(gt=0)] | None = None
    qk_norm: bool | None = None
    norm_offset: float | None = None
    post_norms: bool | None = None
    embedding_multiplier: float | None = None
    residual_multiplier: float | None = None
    logits_scaling: float | None = None
    fused_projections: bool | None = None

    num_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Count | None = None
    norm_topk_prob: bool | None = None
    dense_layers: list[Size] | None = None

    def __post_init__(self) -> None:
        if self.num_experts and (self.num_experts_per_tok or 1) > self.num_experts:
            raise ValueError("num_experts_per_tok is above num_experts")

    def complete(self) -> DecoderConfig:
        """With every default filled in. Raises ConfigError for what is missing or does not fit."""
        missing = [name for name in REQUIRED if getattr(self, name) is None]
        if missing:
            raise ConfigError(
                f"model: {', '.join(missing)} must be set; give a checkpoint with model.path, "
                "or take a model option that carries its architecture"
            )
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
        layers = self.num_hidden_layers or 0
        types = self.layer_types or ["full_attention"] * layers
        if len(types) < layers:
            raise ConfigError(
                f"model.layer_types has {len(types)} entries for {layers} layers "
                "(model.num_hidden_layers)"
            )
        limit = self.max_position_embeddings or 0
        if (self.max_model_len or 0) > limit:
            raise ConfigError(
                f"model.max_model_len ({self.max_model_len}) is above what the model was made "
                f"for: model.max_position_embeddings is {limit}"
            )
        return msgspec.structs.replace(
            self,
            max_model_len=self.max_model_len or limit,
            num_key_value_heads=kv_heads,
            head_dim=self.head_dim or hidden // heads,
            rms_norm_eps=1e-6 if self.rms_norm_eps is None else self.rms_norm_eps,
            hidden_act=self.hidden_act or "silu",
            tie_word_embeddings=bool(self.tie_word_embeddings),
            eos_token_ids=self.eos_token_ids or [],
            rope_theta=self.rope_theta or 10000.0,
            partial_rotary_factor=self.partial_rotary_factor or 1.0,
            layer_types=types[:layers],
            norm_offset=self.norm_offset or 0.0,
            moe_intermediate_size=self.moe_intermediate_size or self.intermediate_size,
            norm_topk_prob=self.norm_topk_prob is not False,
        )
