"""Any other causal model: transformers' own code, with our attention and cache plugged in through
its attention interface."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vllm_di.components.attention.spec import check_attention
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    Communicator,
    Device,
    Model,
    ModelStep,
)
from vllm_di.components.messages import KvSpec
from vllm_di.errors import CheckpointError, ConfigError, UnsupportedModelError
from vllm_di.models.config import DecoderConfig
from vllm_di.models.flat_check import Head, body_of, check_flat_steps
from vllm_di.models.hf_attention import STEP, Step
from vllm_di.models.hf_config import FAMILIES

log = logging.getLogger(__name__)

T = TypeVar("T")


class TransformersModel(Model):
    """Runs on one rank. What a step of several sequences would change is refused after loading,
    by evidence (``flat_check``)."""

    def __init__(
        self,
        device: Device,
        attention: AttentionBackend,
        communicator: Communicator,
        *,
        config: DecoderConfig,
    ) -> None:
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
        self._name = str(config.architecture)
        hf = self._guarded("config.json cannot be read", _read_config, config.path)
        if not _is_causal(hf):
            raise self._refused("it is no causal language model that transformers knows")
        self.dtype = device.dtype(config.dtype)
        self._attention, self._device = attention, device.torch_device
        with torch.device("meta"):  # its weights come later, and are then made once
            self._model = self._guarded("it cannot be built", self._make, hf)
        if not getattr(self._model, "_supports_attention_backend", False):
            raise self._refused("its attention cannot be replaced (transformers says so)")
        self._hf = hf.get_text_config()
        self.vocab_size, self.hidden_size, layers = self._guarded(
            "its sizes cannot be read", _sizes, self._hf
        )
        self._kv_specs = _first_guess(self._hf, layers)
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
        self._head, self._weight_bytes = Head(), 0
        self._gives_hidden = False

    def _make(self, hf: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(hf, dtype=self.dtype).eval()

    def _refused(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._name} is refused: {why}; {_supported()}")

    def _guarded(self, what: str, call: Callable[..., T], *args: Any) -> T:
        """Run transformers' code; whatever it raises is a refusal with the model's name."""
        try:
            return call(*args)
        except UnsupportedModelError as error:
            raise self._refused(str(error)) from None
        except (MemoryError, torch.OutOfMemoryError, CheckpointError):
            raise
        except Exception as error:  # foreign code for any architecture raises anything
            line = (str(error).strip().splitlines() or [""])[0]
            raise self._refused(f"{what}: {type(error).__name__}: {line[:200]}") from error

    def kv_specs(self) -> list[KvSpec]:
        return list(self._kv_specs)

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
        wrong = {k: sorted(map(str, v))[:5] for k, v in told.items() if v}
        if wrong:
            facts = "; ".join(f"{k}: {', '.join(v)}" for k, v in wrong.items())
            raise CheckpointError(f"{kind.__name__}: the weights do not fit: {facts}")
        self._model.to(self._device).eval()
        self._check()

    @torch.no_grad()
    def load_random(self, seed: int) -> None:
        with torch.device(self._device):
            self._model = self._guarded("it cannot be built", self._make, self._model.config)
        generator = torch.Generator(self._device).manual_seed(seed)
        for parameter in self._model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
        self._model.tie_weights()
        self._check()

    def _check(self) -> None:
        """Refuse what would run wrong, before the first request."""
        evidence = self._guarded(
            "it fails in a step of several sequences",
            check_flat_steps,
            self._model,
            len(self._kv_specs),
            self.max_model_len,
        )
        backend = type(self._attention)
        for spec in evidence.specs.values():
            if spec.sinks is not None and not backend.takes_sinks:
                raise self._refused(
                    f"its attention has sinks, which {backend.__name__} does not take; "
                    "attention=sdpa does"
                )
            check_attention(self._attention, spec)
        for key, value in sorted(evidence.uneven):
            log.warning(
                "%s: a head's keys have %d elements and its values %d: the KV cache holds both "
                "with %d, not the latent that they are made from",
                self._name,
                key,
                value,
                max(key, value),
            )
        self._head = evidence.head
        self._kv_specs = [
            KvSpec(layer=i, num_kv_heads=spec.num_kv_heads, head_size=spec.head_size)
            for i, spec in enumerate(_each_layer(evidence.specs, len(self._kv_specs)))
        ]
        self._weight_bytes = sum(p.nbytes for p in self._model.parameters())

    def forward(self, step: ModelStep) -> Tensor:
        metadata = [step.metadata[group] for group in step.groups]
        out = body_of(self._model)(
            input_ids=step.token_ids[None],
            position_ids=step.positions[None],
            use_cache=False,
            **{STEP: Step(self._attention, step.caches, metadata)},
        )
        normed: Tensor = out.last_hidden_state[0]
        return normed

    def give_hidden(self) -> int:
        self._gives_hidden = True
        return self.hidden_size

    def logits(self, hidden: Tensor) -> Tensor:
        if self._gives_hidden:
            return hidden.float()
        head = self._model.get_output_embeddings()
        if self._head.before != 1.0:
            hidden = hidden * self._head.before
        return self._head.bend(head(hidden).float())

    def weight_bytes(self) -> int:
        return self._weight_bytes

    def release(self) -> None:
        self._model = self._model.to("meta")


def _read_config(path: str) -> Any:
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if hasattr(hf, "quantization_config"):  # the loader brings floats
        del hf.quantization_config
    return hf


def _sizes(hf: Any) -> tuple[int, int, int]:
    """-> (vocabulary, width, layers)."""
    return int(hf.vocab_size), int(hf.hidden_size), int(hf.num_hidden_layers)


def _first_guess(hf: Any, layers: int) -> list[KvSpec]:
    """What each layer caches, by the config's common names; what the layers do is seen once the
    weights are there. Some classes refuse to be asked for what differs between layers."""

    def ask(name: str) -> int:
        try:
            return int(getattr(hf, name, None) or 0)
        except (TypeError, ValueError, AttributeError, RuntimeError):
            return 0

    heads = ask("num_attention_heads") or 1
    size = ask("head_dim") or ask("hidden_size") // heads
    kv_heads = ask("num_key_value_heads") or heads
    return [KvSpec(layer=i, num_kv_heads=kv_heads, head_size=size) for i in range(layers)]


def _each_layer(specs: dict[int, AttentionSpec], layers: int) -> list[AttentionSpec]:
    """A layer that never attends has a cache like its neighbour's, which nothing writes to."""
    known = sorted(specs)
    return [specs[max((k for k in known if k <= i), default=known[0])] for i in range(layers)]


def _is_causal(hf: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return hf.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not hf.is_encoder_decoder


def _supported() -> str:
    return (
        f"native are {', '.join(sorted(FAMILIES))}; of the others those run that "
        "docs/transformers-models.md lists as equal"
    )
