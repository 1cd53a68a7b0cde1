"""Slots that hold the model and run a step of it: model, loader, graph, shapes, program."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    Communicator,
    Device,
    GraphPolicy,
    KvLayout,
    LayerCache,
    Loader,
    Model,
    ModelProgram,
    ModelStep,
    OpTable,
    Quantization,
    ShapePolicy,
    StepFunction,
)
from vllm_di.components.messages import KvGroup, KvSpec
from vllm_di.errors import CheckpointError, ConfigError


class FrozenLlama(Model):
    """A Llama of one rank, its weights in a dictionary by their Hugging Face names."""

    def __init__(
        self,
        device: Device,
        ops: OpTable,
        attention: AttentionBackend,
        communicator: Communicator,
        quantization: Quantization,
        *,
        dtype: str,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        max_model_len: int,
        rms_norm_eps: float,
        rope_theta: float,
        eos_token_ids: list[int],
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.max_model_len, self.eos_token_ids = max_model_len, eos_token_ids
        self.dtype = device.dtype(dtype)
        self._ops, self._attention, self._quantization = ops, attention, quantization
        self._layers, self._kv_heads, self._head_dim = (
            num_hidden_layers,
            num_key_value_heads,
            head_dim,
        )
        self._spec = AttentionSpec(
            num_attention_heads, num_key_value_heads, head_dim, head_dim**-0.5
        )
        attention.check(self._spec)
        self._eps, self._reduce = rms_norm_eps, communicator.all_reduce
        frequencies = rope_theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.arange(max_model_len)[:, None] * frequencies
        self._cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        heads, kv = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self._shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (vocab_size, hidden_size)
        }
        for i in range(num_hidden_layers):
            layer = f"model.layers.{i}"
            self._shapes |= {
                f"{layer}.input_layernorm.weight": (hidden_size,),
                f"{layer}.self_attn.q_proj.weight": (heads, hidden_size),
                f"{layer}.self_attn.k_proj.weight": (kv, hidden_size),
                f"{layer}.self_attn.v_proj.weight": (kv, hidden_size),
                f"{layer}.self_attn.o_proj.weight": (hidden_size, heads),
                f"{layer}.post_attention_layernorm.weight": (hidden_size,),
                f"{layer}.mlp.gate_proj.weight": (intermediate_size, hidden_size),
                f"{layer}.mlp.up_proj.weight": (intermediate_size, hidden_size),
                f"{layer}.mlp.down_proj.weight": (hidden_size, intermediate_size),
            }
        self._shapes |= {
            "model.norm.weight": (hidden_size,),
            "lm_head.weight": (vocab_size, hidden_size),
        }
        self._weights: dict[str, Tensor] = {}
        self._products: dict[str, Callable[[Tensor], Tensor]] = {}

    def kv_specs(self) -> list[KvSpec]:
        return [
            KvSpec(layer=i, num_kv_heads=self._kv_heads, head_size=self._head_dim)
            for i in range(self._layers)
        ]

    def load_weights(self, weights: Iterator[tuple[str, Any]]) -> None:
        for name, tensor in weights:
            if self._shapes.get(name) != tuple(tensor.shape):
                raise CheckpointError(
                    f"tensor {name} has shape {list(tensor.shape)}, the model asks for "
                    f"{self._shapes.get(name, 'no such tensor')}"
                )
            self._weights[name] = tensor.to(self.dtype)
        if missing := self._shapes.keys() - self._weights.keys():
            raise CheckpointError(f"the checkpoint lacks {', '.join(sorted(missing))}")
        self._finalize()

    def load_random(self, seed: int) -> None:
        """Each tensor by a generator of its own, seeded with its name."""
        for name, shape in self._shapes.items():
            tensor = torch.ones(shape)
            if "norm" not in name:
                generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
                tensor = torch.empty(shape).normal_(0, 0.02, generator=generator)
            self._weights[name] = tensor.to(self.dtype)
        self._finalize()

    def _finalize(self) -> None:
        for name, weight in self._weights.items():
            if weight.dim() == 2 and name != "model.embed_tokens.weight":
                dtype = torch.float32 if name == "lm_head.weight" else None
                self._products[name] = self._quantization.linear(weight, None, dtype)

    def forward(self, step: ModelStep) -> Tensor:
        x = self._ops.embedding(step.token_ids, self._weights["model.embed_tokens.weight"])
        for i, (cache, group) in enumerate(zip(step.caches, step.groups, strict=True)):
            x = self._layer(f"model.layers.{i}", x, step.positions, cache, step.metadata[group])
        return self._norm("model.norm", x)

    def _layer(
        self, name: str, x: Tensor, positions: Tensor, cache: LayerCache, metadata: Any
    ) -> Tensor:
        def heads(projection: str) -> Tensor:
            run = self._products[f"{name}.self_attn.{projection}_proj.weight"]
            product: Tensor = run(normed)
            shape = (len(product), -1, self._head_dim)
            return product.view(shape)

        normed = self._norm(f"{name}.input_layernorm", x)
        q, k = self._ops.rotary_embedding(positions, heads("q"), heads("k"), self._cos_sin, False)
        mixed = self._attention.forward(q, k, heads("v"), cache, metadata, self._spec)
        x = x + self._reduce(self._products[f"{name}.self_attn.o_proj.weight"](mixed.flatten(1)))
        normed = self._norm(f"{name}.post_attention_layernorm", x)
        gate, up = (self._products[f"{name}.mlp.{p}_proj.weight"](normed) for p in ("gate", "up"))
        inner = self._ops.silu_and_mul(torch.cat((gate, up), -1))
        return x + self._reduce(self._products[f"{name}.mlp.down_proj.weight"](inner))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self._ops.rms_norm(x, self._weights[f"{name}.weight"], self._eps)

    def logits(self, hidden: Tensor) -> Tensor:
        product: Tensor = self._products["lm_head.weight"](hidden)
        return product

    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights.values())


class FrozenLoader(Loader):
    """Random weights."""

    def __init__(self, *, seed: int, path: str | None) -> None:
        if path is not None:
            raise ConfigError("loader=frozen_2_0 reads no checkpoint; choose loader=auto")
        self._seed = seed

    def load(self, model: Model) -> None:
        model.load_random(self._seed)


class FrozenGraph(GraphPolicy):
    """No graph: the model itself runs."""

    def __init__(self) -> None: ...

    def wrap(self, forward: StepFunction) -> StepFunction:
        return forward


class FrozenShapes(ShapePolicy):
    """Batches as they come."""

    def __init__(self) -> None: ...

    def pad(self, plan: BatchPlan) -> BatchPlan:
        return plan


class FrozenProgram(ModelProgram):
    """Metadata, the layers, then the logits of the wanted rows."""

    def __init__(
        self, model: Model, attention: AttentionBackend, kv_layout: KvLayout, graph: GraphPolicy
    ) -> None:
        self._model, self._attention, self._layout = model, attention, kv_layout
        self._graph, self._forward = graph, graph.wrap(model.forward)
        self._caches: list[LayerCache] = []

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        specs = self._model.kv_specs()
        self._caches = self._layout.allocate(specs, num_blocks, self._model.dtype)

    @property
    def caches(self) -> Sequence[LayerCache]:
        return self._caches

    def run(self, plan: BatchPlan) -> Tensor:
        with torch.inference_mode():
            plan, out = self._graph.place(plan)
            metadata = self._attention.build(plan.of_group(0), out[0] if out else None)
            step = ModelStep(
                token_ids=plan.token_ids,
                positions=plan.positions,
                caches=self._caches,
                groups=[0] * len(self._caches),
                metadata=[metadata],
            )
            hidden = self._forward(step)
            return self._model.logits(hidden[plan.logits_rows])
