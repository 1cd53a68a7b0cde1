"""Encoders of the BERT family: each token sees its whole text, and nothing is cached. A
cross-encoder is one with a head that scores a pair of texts.

Attention comes through its slot, products through the quantization. Layer norms and activations are
torch's: the table of ops has none of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_di.components.attention.spec import check_attention
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    Communicator,
    Device,
    LayerCache,
    Model,
    ModelStep,
    OpTable,
    Quantization,
)
from vllm_di.components.messages import KvSpec
from vllm_di.errors import CheckpointError, ConfigError, UnsupportedModelError, nearest
from vllm_di.models.config import DecoderConfig
from vllm_di.models.encoder_config import CROSS_ENCODERS, ENCODERS
from vllm_di.models.tensors import (
    Kind,
    check_all_there,
    check_floats,
    check_once,
    check_shape,
    random_tensor,
)

log = logging.getLogger(__name__)

PREFIXES = ("bert.", "roberta.")
"""Of names in checkpoints that were saved with a head."""
UNUSED = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids", "embeddings.token_type_ids")
"""Beginnings of the names of what makes no hidden state: heads that are not used, and buffers of
indices."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
Product = Callable[[Tensor], Tensor]


class EncoderConfig(DecoderConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An encoder's architecture; of a decoder's keys it reads those that it has."""

    hidden_act: Literal["gelu", "gelu_tanh", "relu", "silu"] | None = None  # type: ignore[assignment]
    layer_norm_eps: Annotated[float, msgspec.Meta(ge=0)] = 1e-12
    type_vocab_size: Annotated[int, msgspec.Meta(ge=0)] = 2
    first_position: Annotated[int, msgspec.Meta(ge=0)] = 0


class Encoder(Model):
    """The whole encoder on one rank."""

    causal = False

    def __init__(
        self,
        device: Device,
        ops: OpTable,
        attention: AttentionBackend,
        communicator: Communicator,
        quantization: Quantization,
        *,
        config: EncoderConfig,
    ) -> None:
        c = config.complete()
        if c.architecture not in ENCODERS:
            raise UnsupportedModelError(
                f"model.architecture {c.architecture!r} is no encoder; known are "
                f"{', '.join(ENCODERS)}{nearest(str(c.architecture), ENCODERS)}"
            )
        if communicator.world_size > 1 or c.layers is not None:
            raise ConfigError(
                f"{c.architecture}: an encoder runs on one rank and in one piece; take "
                "executor.tensor_parallel_size=1, and leave model.layers alone"
            )
        if not attention.takes_bidirectional:
            raise ConfigError(
                f"{c.architecture} is an encoder, whose tokens see those behind them: "
                f"{type(attention).__name__} cannot do that; take attention=sdpa",
                key="attention",
            )
        assert c.vocab_size and c.hidden_size and c.num_attention_heads and c.max_model_len
        assert c.num_hidden_layers and c.hidden_act and c.max_position_embeddings
        self._config, self._ops, self._quantization = config, ops, quantization
        self._attention, self.dtype = attention, device.dtype(c.dtype)
        self._on, self._eps = device.torch_device, config.layer_norm_eps
        self.vocab_size, self.hidden_size = c.vocab_size, c.hidden_size
        self.max_model_len, self.eos_token_ids = c.max_model_len, []
        self._num_layers, self._heads = c.num_hidden_layers, c.num_attention_heads
        size = c.hidden_size // c.num_attention_heads
        self._spec = AttentionSpec(self._heads, self._heads, size, size**-0.5, causal=False)
        check_attention(attention, self._spec)
        self._act = ACTIVATIONS[c.hidden_act]
        self._head: tuple[str, ...] = CROSS_ENCODERS.get(c.architecture, ())
        if self._head:
            self.pools_to = "score"
        if not ENCODERS[c.architecture] and config.type_vocab_size > 1:
            self.token_types = config.type_vocab_size
        self._shapes = self._names(c.max_position_embeddings + config.first_position)
        self._weights: dict[str, Tensor] = {}
        self._products: dict[str, Product] = {}
        self._bytes = 0

    def _names(self, positions: int) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint must bring, and its shape."""
        c, wide = self._config, self.hidden_size
        inner = c.intermediate_size or 0
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.word_embeddings.weight": (self.vocab_size, wide),
            "embeddings.position_embeddings.weight": (positions, wide),
        }
        if c.type_vocab_size:
            shapes["embeddings.token_type_embeddings.weight"] = (c.type_vocab_size, wide)
        products = {
            "attention.self.query": (wide, wide),
            "attention.self.key": (wide, wide),
            "attention.self.value": (wide, wide),
            "attention.output.dense": (wide, wide),
            "intermediate.dense": (inner, wide),
            "output.dense": (wide, inner),
        }
        for name, rows in zip(self._head, (wide, 1), strict=False):
            shapes |= {f"{name}.weight": (rows, wide), f"{name}.bias": (rows,)}
        norms = ["embeddings.LayerNorm"]
        for layer in range(self._num_layers):
            start = f"encoder.layer.{layer}."
            norms += [f"{start}attention.output.LayerNorm", f"{start}output.LayerNorm"]
            for name, shape in products.items():
                shapes |= {f"{start}{name}.weight": shape, f"{start}{name}.bias": shape[:1]}
        for norm in norms:
            shapes |= {f"{norm}.weight": (wide,), f"{norm}.bias": (wide,)}
        return shapes

    # -- weights ------------------------------------------------------------------------------

    @torch.no_grad()
    def load_weights(self, weights: Iterator[tuple[str, Any]]) -> None:
        left_out: list[str] = []
        for raw, tensor in weights:
            name = raw
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            if name not in self._shapes and name.startswith(UNUSED):
                left_out.append(raw)
                continue
            if name not in self._shapes:
                raise CheckpointError(
                    f"tensor {raw} is in the checkpoint but not in the model"
                    f"{nearest(name, self._shapes)}"
                )
            check_once(name, raw, name not in self._weights)
            check_shape(raw, tensor.shape, self._shapes[name])
            check_floats(raw, tensor)
            self._weights[name] = tensor.to(self._on, self.dtype)
        check_all_there(self._shapes.keys() - self._weights.keys())
        if left_out:
            log.warning("%d tensors are left out: %s", len(left_out), ", ".join(left_out[:5]))
        self._finalize()

    @torch.no_grad()
    def load_random(self, seed: int) -> None:
        for name, shape in self._shapes.items():
            kind: Kind = "weight"
            if name.endswith(".bias"):
                kind = "bias"
            elif "LayerNorm" in name:
                kind = "norm"
            self._weights[name] = random_tensor(name, seed, shape, kind).to(self._on, self.dtype)
        self._finalize()

    def _finalize(self) -> None:
        """Hand the linear weights to the quantization; from here on the model can run."""
        products = ("encoder.", *self._head)
        for name in [n for n in self._weights if n.startswith(products) and "LayerNorm" not in n]:
            base, _, part = name.rpartition(".")
            if part == "weight":
                weight, bias = self._weights.pop(name), self._weights.pop(f"{base}.bias")
                self._bytes += self._quantization.num_bytes(weight) + bias.nbytes
                dtype = torch.float32 if base in self._head[1:] else None
                self._products[base] = self._quantization.linear(weight, bias, dtype)
        self._bytes += sum(tensor.nbytes for tensor in self._weights.values())

    def weight_bytes(self) -> int:
        return self._bytes

    # -- running ------------------------------------------------------------------------------

    def kv_specs(self) -> list[KvSpec]:
        """No layer keeps a cache."""
        return []

    def forward(self, step: ModelStep) -> Tensor:
        (metadata,) = step.metadata
        x = self._embed(step.token_ids, step.positions, step.token_types)
        for layer in range(self._num_layers):
            x = self._layer(f"encoder.layer.{layer}.", x, metadata)
        return x

    def _embed(self, token_ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """token_ids, positions and types [tokens] -> [tokens, hidden]"""
        weights = self._weights
        x = self._ops.embedding(token_ids, weights["embeddings.word_embeddings.weight"])
        places = positions + self._config.first_position
        x = x + self._ops.embedding(places, weights["embeddings.position_embeddings.weight"])
        if self._config.type_vocab_size:
            kinds = weights["embeddings.token_type_embeddings.weight"]
            # a model that does not tell texts apart takes all tokens for those of the first
            x = x + (kinds[0] if types is None else self._ops.embedding(types, kinds))
        return self._norm("embeddings.LayerNorm", x)

    def _layer(self, name: str, x: Tensor, metadata: Any) -> Tensor:
        """x [tokens, hidden] -> as x"""
        run = self._products
        q, k, v = (
            run[f"{name}attention.self.{part}"](x).unflatten(-1, (self._heads, -1))
            for part in ("query", "key", "value")
        )
        mixed = self._attention.forward(q, k, v, LayerCache(()), metadata, self._spec)
        mixed = run[f"{name}attention.output.dense"](mixed.flatten(1))
        x = self._norm(f"{name}attention.output.LayerNorm", mixed + x)
        inner = self._act(run[f"{name}intermediate.dense"](x))
        return self._norm(f"{name}output.LayerNorm", run[f"{name}output.dense"](inner) + x)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weights = self._weights
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(x, (self.hidden_size,), scale, shift, self._eps)

    def give_hidden(self) -> int:
        return 1 if self._head else self.hidden_size

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> the same in fp32; of a cross-encoder [rows, 1], its scores."""
        if not self._head:
            return hidden.float()
        dense, score = self._head
        return self._products[score](torch.tanh(self._products[dense](hidden)))
