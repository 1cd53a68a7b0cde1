"""Any other causal model: transformers' own code, with our attention and cache plugged in through
its attention interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    Communicator,
    Device,
    LayerCache,
    Model,
)
from vllm_di.components.messages import KvSpec
from vllm_di.errors import CheckpointError, ConfigError, UnsupportedModelError
from vllm_di.models.config import DecoderConfig
from vllm_di.models.hf_config import FAMILIES

NAME = "vllm_di"
"""Of our attention among transformers' implementations."""
STEP = "vllm_di_step"
"""The keyword under which a step's state goes through the model's layers to their attention."""


@dataclass(slots=True)
class Step:
    """What the attention of each layer needs of the step that runs."""

    backend: AttentionBackend
    caches: Sequence[LayerCache]
    metadata: Any


class TransformersModel(Model):
    """Runs on one rank. Models whose attention is not the common one are refused, never run
    wrong."""

    def __init__(
        self,
        device: Device,
        attention: AttentionBackend,
        communicator: Communicator,
        *,
        config: DecoderConfig,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if communicator.world_size > 1:
            raise ConfigError(
                f"{config.architecture} runs on transformers' code, which cannot be split over "
                f"{communicator.world_size} ranks; take executor.tensor_parallel_size=1"
            )
        if config.layers is not None:
            raise ConfigError(
                f"model.layers {list(config.layers)}: {config.architecture} runs on transformers' "
                "code, which cannot be cut into the stages of a pipeline; native models can: "
                f"{', '.join(sorted(FAMILIES))}"
            )
        if config.path is None or not Path(config.path).is_dir():
            raise UnsupportedModelError(
                f"{config.architecture}: a model without native code needs a folder with "
                f"config.json as model.path, not {config.path!r}"
            )
        hf = AutoConfig.from_pretrained(config.path, trust_remote_code=False)
        _refuse_foreign(hf, str(config.architecture))
        self.dtype = device.dtype(config.dtype)
        self._attention, self._device = attention, device.torch_device
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
        with torch.device(self._device):
            self._model = AutoModelForCausalLM.from_config(hf, dtype=self.dtype).eval()
        if not getattr(self._model, "_supports_attention_backend", False):
            raise UnsupportedModelError(
                f"{config.architecture}: its attention cannot be replaced (transformers says so); "
                f"{_supported()}"
            )
        self._hf = hf.get_text_config()
        self.vocab_size, self.hidden_size = int(self._hf.vocab_size), int(self._hf.hidden_size)
        limit = config.max_position_embeddings or getattr(self._hf, "max_position_embeddings", None)
        if limit is None and config.max_model_len is None:
            raise ConfigError(
                f"{config.architecture} names no longest context: set model.max_model_len"
            )
        self.max_model_len = int(config.max_model_len or limit or 0)
        if limit is not None and self.max_model_len > limit:
            raise ConfigError(
                f"model.max_model_len ({self.max_model_len}) is above the model's own {limit}"
            )
        self.eos_token_ids = config.eos_token_ids or []
        self._logit_scale, self._weight_bytes = 1.0, 0

    def kv_specs(self) -> list[KvSpec]:
        heads = self._hf.num_attention_heads
        kv_heads = getattr(self._hf, "num_key_value_heads", None) or heads
        size = getattr(self._hf, "head_dim", None) or self._hf.hidden_size // heads
        return [
            KvSpec(layer=i, num_kv_heads=kv_heads, head_size=size)
            for i in range(self._hf.num_hidden_layers)
        ]

    @torch.no_grad()
    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        kind = type(self._model)
        # transformers itself knows which names of a checkpoint have changed since
        self._model, told = kind.from_pretrained(
            None,
            config=self._model.config,
            state_dict=dict(weights),
            dtype=self.dtype,
            output_loading_info=True,
        )
        self._model.eval()
        wrong = {k: sorted(map(str, v))[:5] for k, v in told.items() if v}
        if wrong:
            facts = "; ".join(f"{k}: {', '.join(v)}" for k, v in wrong.items())
            raise CheckpointError(f"{kind.__name__}: the weights do not fit: {facts}")
        self._check_logits()

    @torch.no_grad()
    def load_random(self, seed: int) -> None:
        generator = torch.Generator(self._device).manual_seed(seed)
        for parameter in self._model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
        self._model.tie_weights()
        self._check_logits()

    def _check_logits(self) -> None:
        """The step takes logits of some rows alone, so the head is called apart from the model.

        Some models change logits after the head. A constant factor is found here; anything else is
        refused.
        """
        ids = torch.arange(1, 5, dtype=torch.int64, device=self._device)[None] % self.vocab_size
        whole = self._model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = self._model.get_output_embeddings()(hidden).float()
        scale = float((whole * ours).sum() / (ours * ours).sum())
        if not torch.allclose(whole, ours * scale, rtol=2e-2, atol=1e-3 * float(ours.abs().max())):
            raise UnsupportedModelError(
                f"{type(self._model).__name__} changes its logits after the head in a way that "
                f"cannot be followed; {_supported()}"
            )
        self._logit_scale = scale if abs(scale - 1) > 1e-3 else 1.0
        self._weight_bytes = sum(p.nbytes for p in self._model.parameters())
        self._model.set_attn_implementation(NAME)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: Sequence[LayerCache],
        metadata: Any,
        hidden: Tensor | None = None,
    ) -> Tensor:
        step = Step(self._attention, caches, metadata)
        out = self._model.base_model(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False, **{STEP: step}
        )
        normed: Tensor = out.last_hidden_state[0]
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        head = self._model.get_output_embeddings()
        out: Tensor = head(hidden).float()
        return out if self._logit_scale == 1.0 else out * self._logit_scale

    def weight_bytes(self) -> int:
        return self._weight_bytes

    def release(self) -> None:
        self._model = self._model.to("meta")


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query [1, heads, tokens, head_size] -> [1, tokens, heads,
    head_size]."""
    step = kwargs.get(STEP)
    if not isinstance(step, Step):
        raise UnsupportedModelError(
            f"{type(module).__name__} does not hand its keywords on to its attention; "
            f"{_supported()}"
        )
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} has attention sinks; {_supported()}")
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{type(module).__name__} is not causal; {_supported()}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, head_size]
    spec = AttentionSpec(
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_size=q.shape[2],
        scale=q.shape[2] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        soft_cap=softcap,
    )
    cache = step.caches[module.layer_idx]
    out = step.backend.forward(
        q.contiguous(), k.contiguous(), v.contiguous(), cache, step.metadata, spec
    )
    return out[None], None


def _refuse_foreign(hf: Any, architecture: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if hf.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hf.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{architecture} is no causal language model that transformers knows; {_supported()}"
        )


def _supported() -> str:
    return (
        f"native are {', '.join(sorted(FAMILIES))}; of the others, causal models run whose "
        "attention transformers lets be replaced"
    )
