"""The native decoder: one model for Llama and its relatives, built from injected layers.

What differs between the families is data (``DecoderConfig``); ``hf_config.py`` reads it from a
checkpoint.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from vllm_di.components.attention.spec import check_attention
from vllm_di.components.interfaces import (
    AttentionBackend,
    Communicator,
    Device,
    Model,
    ModelStep,
    NamedWeight,
    OpTable,
    Quantization,
    WeightPart,
)
from vllm_di.components.messages import KvSpec
from vllm_di.components.quantized import QuantizedWeight
from vllm_di.errors import CheckpointError, ConfigError, UnsupportedModelError, nearest
from vllm_di.models.blocks import Layer, Parts
from vllm_di.models.config import DecoderConfig
from vllm_di.models.hf_config import FAMILIES
from vllm_di.models.layers import Linear, Norm, Target, VocabParallel
from vllm_di.models.moe import Experts
from vllm_di.models.rope import cos_sin_table
from vllm_di.models.tensors import (
    check_all_there,
    check_floats,
    check_once,
    check_shape,
    random_tensor,
)

log = logging.getLogger(__name__)

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INV_FREQ = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
VISION = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
"""Of a Gemma 3 that sees images too; its text model runs alone."""


class Decoder(nn.Module, Model):
    """The model on one rank, or the layers [first, end) of it that make a stage of a pipeline."""

    reuses = frozenset({"record", "capture"})
    families: ClassVar[Collection[str]] = FAMILIES
    """Architectures that it runs; a class built on this one names its own."""

    def __init__(
        self,
        device: Device,
        ops: OpTable,
        attention: AttentionBackend,
        communicator: Communicator,
        quantization: Quantization,
        *,
        config: DecoderConfig,
    ) -> None:
        super().__init__()
        experts = ops.library_of("fused_experts") if config.num_experts else None
        if experts is not None and "fused_experts" in experts.asks_host:
            log.info("the model cannot be captured: ops.fused_experts asks the host")
            self.reuses -= {"capture"}
        elif config.num_experts and quantization.experts_ask_host:
            log.info("the model cannot be captured: quantised experts ask the host")
            self.reuses -= {"capture"}
        architecture = config.architecture
        if architecture is not None and architecture not in self.families:
            raise UnsupportedModelError(
                f"model.architecture {architecture!r} has no native model in "
                f"{type(self).__name__}, which runs {', '.join(self.families)}"
                f"{nearest(architecture, self.families)}"
            )
        try:
            self._build(config, device, ops, attention, communicator, quantization)
        except (RuntimeError, MemoryError, OverflowError) as error:
            line = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(
                f"a model of these sizes (vocab_size {config.vocab_size}, hidden_size "
                f"{config.hidden_size}, intermediate_size {config.intermediate_size}, "
                f"num_hidden_layers {config.num_hidden_layers}, max_model_len "
                f"{config.max_model_len or config.max_position_embeddings}) cannot be made here: "
                f"{type(error).__name__}: {line[:200]}"
            ) from error

    def _build(
        self,
        config: DecoderConfig,
        device: Device,
        ops: OpTable,
        attention: AttentionBackend,
        communicator: Communicator,
        quantization: Quantization,
    ) -> None:
        quantized_experts = quantization.takes_quantized and quantization.takes_experts
        parts = Parts(
            config, device, ops, attention, communicator, quantized_experts=quantized_experts
        )
        c = parts.config
        assert c.vocab_size and c.hidden_size and c.num_hidden_layers and c.max_model_len
        self.config, self.ops, self.dtype = c, ops, parts.dtype
        self.vocab_size, self.max_model_len = c.vocab_size, c.max_model_len
        self.hidden_size = c.hidden_size
        self._span = parts.config.span
        self.first, self.last = self._span.start == 0, self._span.stop == c.num_hidden_layers
        self.eos_token_ids = c.eos_token_ids or []
        self._quantization, self._device = quantization, parts.device
        self.takes_quantized = quantization.takes_quantized
        self.takes_order = quantization.takes_order
        self._takes: set[str] | None = None
        self.embedding = parts.vocabulary() if self.first else None
        self._vocabulary = parts.vocabulary
        shared = self.embedding if c.tie_word_embeddings else None
        self.head = (shared or parts.vocabulary()) if self.last else None
        self._layers = [Layer(parts, i) for i in self._span]
        self.layers = nn.ModuleList(self._layers)
        self.norm = parts.norm(c.hidden_size)
        if not self.last:  # the final norm runs there; here only the residual sum is used
            self.norm.weight.fill_(1.0)
        for layer in self._layers:
            check_attention(attention, layer.attention.spec)
        self._cos_sin = self._tables(c)
        # rounded to the weights' dtype first, as the models were trained
        self._multiplier = (
            None
            if c.embedding_multiplier is None
            else torch.tensor(c.embedding_multiplier, dtype=parts.dtype, device=parts.device)
        )
        self._eps = c.rms_norm_eps or 0.0
        self._gives_hidden = False

    def _tables(self, c: DecoderConfig) -> list[Tensor]:
        """One rotary table for each layer; layers share them."""
        assert c.head_dim and c.partial_rotary_factor and c.max_model_len and c.rope_theta
        shape = {
            "rotary_dim": int(c.head_dim * c.partial_rotary_factor),
            "num_positions": c.max_model_len,
            "max_position_embeddings": c.max_position_embeddings or 0,
        }
        tables = {
            False: cos_sin_table(theta=c.rope_theta, scaling=c.rope_scaling, **shape).to(
                self._device
            )
        }
        if c.rope_local_theta is not None:
            local = cos_sin_table(theta=c.rope_local_theta, scaling=None, **shape)
            tables[True] = local.to(self._device)
        return [tables[layer.attention.local] for layer in self._layers]

    # -- weights ------------------------------------------------------------------------------

    def targets(self) -> dict[str, Target]:
        """Every tensor that a checkpoint must bring, by its Hugging Face name."""
        targets: dict[str, Target] = {}
        if self.embedding is not None:
            targets |= self.embedding.targets("model.embed_tokens")
        for i, layer in zip(self._span, self._layers, strict=True):
            targets |= layer.targets(f"model.layers.{i}")
        if self.last:
            targets |= self.norm.targets("model.norm")
        if self.head is not None and self.head is not self.embedding:
            tied = self.config.tie_word_embeddings
            targets |= self.head.targets("model.embed_tokens" if tied else "lm_head")
        return targets

    @torch.no_grad()
    def load_weights(self, weights: Iterator[tuple[str, Any]]) -> None:
        targets = self.targets()
        missing, tied = set(targets), bool(self.config.tie_word_embeddings)
        table = own_head = None
        left_out: list[str] = []
        for raw, tensor in weights:
            name = _own_name(raw)
            if name == TABLE:
                table = tensor
            if name == HEAD and tied and self.last:
                own_head = tensor
                continue
            target = targets.get(name)
            if target is None:
                if name == HEAD and self._gives_hidden:
                    left_out.append(name)
                elif not self._is_elsewhere(name):
                    self._check_left_out(name, tensor, targets)
                    left_out.append(name)
                continue
            check_once(name, raw, name in missing)
            self._fill(name, target, tensor)
            missing.discard(name)
        check_all_there(missing)
        if own_head is not None:
            if table is not None and self._same(own_head, table):
                left_out.append(f"{HEAD} (equal to {TABLE})")
            else:
                self._untie(own_head)
        if left_out:
            log.warning("%d tensors are left out: %s", len(left_out), _summary(left_out))
        self.finalize()

    def keeps_quantized(self, name: str) -> bool:
        if self._takes is None:
            self._takes = {name for name, target in self.targets().items() if target.quantized}
            self._takes |= {TABLE, HEAD}
        own = _own_name(name)
        # what another stage has it takes as it is
        return self.takes_quantized and (own in self._takes or self._is_elsewhere(own))

    def _fill(self, name: str, target: Target, tensor: Any) -> None:
        check_shape(name, tensor.shape, target.shape)
        if isinstance(tensor, QuantizedWeight) and not target.quantized:
            tensor = tensor.dequantize(self.dtype)
        if isinstance(tensor, Tensor):
            check_floats(name, tensor)
        try:
            target.fill(tensor)
        except ValueError as error:  # a share that cuts a group
            raise CheckpointError(f"tensor {name}: {error}") from None

    def _same(self, one: Any, other: Any) -> bool:
        """Whether two tensors of a checkpoint are the same matrix for this model."""
        if tuple(one.shape) != tuple(other.shape):
            return False
        plain = [
            t.dequantize(self.dtype) if isinstance(t, QuantizedWeight) else t.to(self.dtype)
            for t in (one, other)
        ]
        return torch.equal(*plain)

    def _untie(self, tensor: Any) -> None:
        """The checkpoint has a head of its own though its config says that there is none: it is
        what was trained, and transformers reads it."""
        log.warning(
            "%s differs from %s, though config.json says tie_word_embeddings: the checkpoint's own "
            "head is used",
            HEAD,
            TABLE,
        )
        self.config = msgspec.structs.replace(self.config, tie_word_embeddings=False)
        self.head = self._vocabulary()
        self._fill(HEAD, self.head.targets("lm_head")[HEAD], tensor)

    def _is_elsewhere(self, name: str) -> bool:
        """Whether the tensor belongs to another stage of the pipeline."""
        number = name.split(".")[2] if name.startswith("model.layers.") else ""
        if number.isdigit() and int(number) < (self.config.num_hidden_layers or 0):
            return int(number) not in self._span
        if name == TABLE:
            return not self.first
        return not self.last and name in ("model.norm.weight", HEAD)

    def _check_left_out(self, name: str, tensor: Any, targets: dict[str, Target]) -> None:
        """Refuse a tensor that nothing takes, but for layers beyond those that are run, rotary
        frequencies, and what sees in a model of several kinds of input."""
        number = name.split(".")[2] if name.startswith("model.layers.") else ""
        if number.isdigit() and int(number) >= (self.config.num_hidden_layers or 0):
            return
        assert self.config.head_dim and self.config.partial_rotary_factor
        rotary = int(self.config.head_dim * self.config.partial_rotary_factor) // 2
        if INV_FREQ.fullmatch(name) and tuple(tensor.shape) == (rotary,):
            return  # the config says how they are computed
        if self.config.architecture == "Gemma3ForCausalLM" and name.startswith(VISION):
            return
        weight = f"{name.removesuffix('.bias')}.weight"
        if name.endswith(".bias") and weight in targets and not bool(tensor.any()):
            return  # quantisers write one of zeros beside each weight
        raise CheckpointError(
            f"tensor {name} is in the checkpoint but not in the model{nearest(name, targets)}"
        )

    @torch.no_grad()
    def load_random(self, seed: int) -> None:
        targets = self.targets()
        for name, tensor in self.random_weights(seed):
            targets[name].fill(tensor)
        self.finalize()

    def random_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors in fp32, by their names: each depends on its name and the seed alone."""
        one = 1.0 - (self.config.norm_offset or 0.0)
        for name, target in self.targets().items():
            yield name, random_tensor(name, seed, target.shape, target.kind, one)

    def finalize(self) -> None:
        """Hand the linear weights to the quantization; from here on the model can run."""
        parts = {n: m for n, m in self.named_modules() if isinstance(m, Linear | Experts)}
        if mixed := [name for name, module in parts.items() if module.is_mixed]:
            log.warning(
                "%d products have weights of which the checkpoint quantizes some, or that it has "
                "in several act-orders: they are dequantised: %s",
                len(mixed),
                _summary(mixed),
            )
        for module in parts.values():
            module.finalize(self._quantization)
        experts = [m for m in parts.values() if isinstance(m, Experts)]
        if fewer := [m for m in experts if m.is_quantized]:
            log.info(
                "experts of %d layers are quantised: ops.quantized_linear and "
                "ops.gated_quantized_linear multiply them, in place of ops.fused_experts",
                len(fewer),
            )
        if self.head is not None:
            self.head.finalize(self._quantization, embeds=self.head is self.embedding)

    def named_weights(self) -> Iterator[NamedWeight]:
        held: dict[int, tuple[Tensor, list[WeightPart]]] = {}
        for name, target in self.targets().items():
            if target.cut is not None and (tensor := target.cut.held()) is not None:
                _, parts = held.setdefault(id(tensor), (tensor, []))
                parts += target.cut.parts(name, target.shape[0])
        for tensor, parts in held.values():
            yield NamedWeight(tensor, tuple(parts))

    def weight_bytes(self) -> int:
        total = 0
        for module in self.modules():
            if isinstance(module, Linear | Experts | VocabParallel):
                total += module.num_bytes
            elif isinstance(module, Norm):
                total += module.weight.nbytes
        return total

    def release(self) -> None:
        for module in self.modules():
            if isinstance(module, Linear | Experts | VocabParallel):
                module.release()

    # -- running ------------------------------------------------------------------------------

    def kv_specs(self) -> list[KvSpec]:
        return [
            KvSpec(
                layer=i,
                num_kv_heads=layer.attention.spec.num_kv_heads,
                head_size=layer.attention.head_size,
                kind="full" if layer.attention.window is None else "sliding",
                window=layer.attention.window,
            )
            for i, layer in zip(self._span, self._layers, strict=True)
        ]

    def forward(self, step: ModelStep) -> Tensor:
        x = self._embed(step.token_ids) if step.hidden is None else step.hidden
        residual: Tensor | None = None
        for layer, cos_sin, cache, group in zip(
            self._layers, self._cos_sin, step.caches, step.groups, strict=True
        ):
            x, residual = layer(x, residual, step.positions, cos_sin, cache, step.metadata[group])
        assert residual is not None
        normed, stream = self.ops.add_rms_norm(x, residual, self.norm.weight, self._eps)
        return normed if self.last else stream

    def _embed(self, token_ids: Tensor) -> Tensor:
        assert self.embedding is not None, "a stage that is not the first needs hidden states"
        x = self.embedding.embed(self.ops.embedding, token_ids)
        return x if self._multiplier is None else x * self._multiplier

    def give_hidden(self) -> int:
        self._gives_hidden, self.head = True, None
        return self.hidden_size

    def logits(self, hidden: Tensor) -> Tensor:
        if self._gives_hidden:
            return hidden.float()
        assert self.head is not None, "a stage that is not the last has no head"
        out = self.head.logits(hidden)
        if self.config.logits_scaling is not None:
            out = out / self.config.logits_scaling
        if (cap := self.config.final_logit_softcapping) is not None:
            out = cap * torch.tanh(out / cap)
        return out


def _own_name(name: str) -> str:
    """Of a tensor of the checkpoint, where the text model is a part of a larger one, or was saved
    without its head."""
    if name.startswith(("layers.", "embed_tokens.", "norm.")):
        return f"model.{name}"
    return name.removeprefix("language_model.").replace("model.language_model.", "model.")


def _summary(names: list[str]) -> str:
    """Names with their numbers taken together: ``model.layers.*.x (30)``."""
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(f"{kind} ({n})" if n > 1 else kind for kind, n in kinds.items())
