"""The native decoder: one model for Llama and its relatives, built from injected layers.

What differs between the families is data (``DecoderConfig``); ``hf_config.py`` reads it from a
checkpoint.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    Communicator,
    Device,
    LayerCache,
    Model,
    OpTable,
    Quantization,
)
from vllm_di.components.messages import KvSpec
from vllm_di.errors import CheckpointError, nearest
from vllm_di.models.config import DecoderConfig
from vllm_di.models.layers import Linear, Norm, Shard, Target, VocabParallel, shard, shard_heads
from vllm_di.models.moe import Experts
from vllm_di.models.rope import cos_sin_table

INIT_STD = 0.02


class Parts:
    """What every layer is built from."""

    def __init__(
        self,
        config: DecoderConfig,
        device: Device,
        ops: OpTable,
        attention: AttentionBackend,
        communicator: Communicator,
    ) -> None:
        self.config = config.complete()
        self.ops, self.attention, self.communicator = ops, attention, communicator
        self.rank, self.world = communicator.rank, communicator.world_size
        self.dtype, self.device = device.dtype(config.dtype), device.torch_device
        self.reduce = communicator.all_reduce
        """Sums the ranks' partial products."""

    def linear(self, outputs: list[Shard], inputs: Shard, bias: bool | None) -> Linear:
        return Linear(outputs, inputs, bias=bool(bias), dtype=self.dtype, device=self.device)

    def norm(self, size: int) -> Norm:
        return Norm(
            size, offset=self.config.norm_offset or 0.0, dtype=self.dtype, device=self.device
        )

    def whole(self, size: int) -> Shard:
        return Shard(size, 0, size)

    def shard(self, size: int, what: str) -> Shard:
        return shard(size, self.rank, self.world, what)


class Attention(nn.Module):
    """Queries, keys and values; rotary; attention over the cache; output."""

    def __init__(self, parts: Parts, layer: int) -> None:
        super().__init__()
        c = parts.config
        assert c.num_attention_heads and c.num_key_value_heads and c.head_dim and c.hidden_size
        self.head_size = c.head_dim
        query = shard_heads(
            c.num_attention_heads, c.head_dim, parts.rank, parts.world, "num_attention_heads"
        )
        kv = shard_heads(
            c.num_key_value_heads, c.head_dim, parts.rank, parts.world, "num_key_value_heads"
        )
        self.sizes = [query.size, kv.size, kv.size]
        self.qkv = parts.linear([query, kv, kv], parts.whole(c.hidden_size), c.attention_bias)
        # a bias of a row-parallel product is added once, on rank 0
        out_bias = bool(c.attention_output_bias) and parts.rank == 0
        self.out = parts.linear([parts.whole(c.hidden_size)], query, out_bias)
        self.q_norm = parts.norm(c.head_dim) if c.qk_norm else None
        self.k_norm = parts.norm(c.head_dim) if c.qk_norm else None
        sliding = (c.layer_types or [])[layer] == "sliding_attention"
        self.window = c.sliding_window if sliding else None
        self.local = sliding and c.rope_local_theta is not None
        self.rotates = layer not in (c.no_rope_layers or [])
        self.fused = bool(c.fused_projections)
        self.spec = AttentionSpec(
            num_heads=query.size // c.head_dim,
            num_kv_heads=kv.size // c.head_dim,
            head_size=c.head_dim,
            scale=c.attention_scale or c.head_dim**-0.5,
            window=self.window,
            soft_cap=c.attn_logit_softcapping,
        )
        self.eps = c.rms_norm_eps or 0.0
        self.ops, self.attend, self.reduce = parts.ops, parts.attention.forward, parts.reduce

    def targets(self, prefix: str) -> dict[str, Target]:
        names = [f"{prefix}.{p}_proj" for p in "qkv"]
        found = (
            self.qkv.fused_target(f"{prefix}.qkv_proj") if self.fused else self.qkv.targets(names)
        )
        found |= self.out.targets([f"{prefix}.o_proj"])
        if self.q_norm and self.k_norm:
            found |= self.q_norm.targets(f"{prefix}.q_norm")
            found |= self.k_norm.targets(f"{prefix}.k_norm")
        return found

    def forward(
        self, x: Tensor, positions: Tensor, cos_sin: Tensor, cache: LayerCache, metadata: Any
    ) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        q, k, v = (
            part.unflatten(-1, (-1, self.head_size))  # [tokens, heads, head_size]
            for part in self.qkv.run(x).split(self.sizes, -1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q = self.ops.rms_norm(q, self.q_norm.weight, self.eps)
            k = self.ops.rms_norm(k, self.k_norm.weight, self.eps)
        if self.rotates:
            q, k = self.ops.rotary_embedding(positions, q, k, cos_sin, False)
        mixed = self.attend(q, k, v, cache, metadata, self.spec)
        return self.reduce(self.out.run(mixed.flatten(1)))


class Mlp(nn.Module):
    """Gate, up, down."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        c = parts.config
        assert c.hidden_size and c.intermediate_size
        inner = parts.shard(c.intermediate_size, "intermediate_size")
        self.gate_up = parts.linear([inner, inner], parts.whole(c.hidden_size), c.mlp_bias)
        bias = bool(c.mlp_bias) and parts.rank == 0
        self.down = parts.linear([parts.whole(c.hidden_size)], inner, bias)
        self.fused = bool(c.fused_projections)
        self.reduce = parts.reduce
        ops = parts.ops
        self.act = ops.silu_and_mul if c.hidden_act == "silu" else ops.gelu_tanh_and_mul

    def targets(self, prefix: str) -> dict[str, Target]:
        if self.fused:
            found = self.gate_up.fused_target(f"{prefix}.gate_up_proj")
        else:
            found = self.gate_up.targets([f"{prefix}.gate_proj", f"{prefix}.up_proj"])
        return found | self.down.targets([f"{prefix}.down_proj"])

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.down.run(self.act(self.gate_up.run(x))))


class Layer(nn.Module):
    """Attention and MLP on a residual stream. ``forward`` takes the stream apart: what was added
    last, and the rest."""

    def __init__(self, parts: Parts, layer: int) -> None:
        super().__init__()
        c = parts.config
        assert c.hidden_size
        self.attention = Attention(parts, layer)
        sparse = c.num_experts is not None and layer not in (c.dense_layers or [])
        self.mlp: Experts | Mlp = Experts(parts) if sparse else Mlp(parts)
        self.input_norm, self.mlp_norm = parts.norm(c.hidden_size), parts.norm(c.hidden_size)
        self.post_attention = parts.norm(c.hidden_size) if c.post_norms else None
        self.post_mlp = parts.norm(c.hidden_size) if c.post_norms else None
        self.eps, self.ops = c.rms_norm_eps or 0.0, parts.ops
        self.multiplier = c.residual_multiplier

    def targets(self, prefix: str) -> dict[str, Target]:
        found = self.attention.targets(f"{prefix}.self_attn")
        mixtral = isinstance(self.mlp, Experts) and self.mlp.block_sparse
        found |= self.mlp.targets(f"{prefix}.{'block_sparse_moe' if mixtral else 'mlp'}")
        found |= self.input_norm.targets(f"{prefix}.input_layernorm")
        if self.post_attention is None or self.post_mlp is None:
            return found | self.mlp_norm.targets(f"{prefix}.post_attention_layernorm")
        found |= self.post_attention.targets(f"{prefix}.post_attention_layernorm")
        found |= self.mlp_norm.targets(f"{prefix}.pre_feedforward_layernorm")
        return found | self.post_mlp.targets(f"{prefix}.post_feedforward_layernorm")

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        cos_sin: Tensor,
        cache: LayerCache,
        metadata: Any,
    ) -> tuple[Tensor, Tensor]:
        """x, residual [tokens, hidden] -> (what the MLP adds, the stream that it is to be added
        to)."""
        if residual is None:
            residual, x = x, self.ops.rms_norm(x, self.input_norm.weight, self.eps)
        else:
            x, residual = self.ops.add_rms_norm(x, residual, self.input_norm.weight, self.eps)
        x = self.attention(x, positions, cos_sin, cache, metadata)
        x = self._after(x, self.post_attention)
        x, residual = self.ops.add_rms_norm(x, residual, self.mlp_norm.weight, self.eps)
        return self._after(self.mlp(x), self.post_mlp), residual

    def _after(self, x: Tensor, norm: Norm | None) -> Tensor:
        if norm is not None:
            x = self.ops.rms_norm(x, norm.weight, self.eps)
        return x if self.multiplier is None else x * self.multiplier


class Decoder(nn.Module, Model):
    """The whole model on one rank."""

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
        parts = Parts(config, device, ops, attention, communicator)
        c = parts.config
        assert c.vocab_size and c.hidden_size and c.num_hidden_layers and c.max_model_len
        self.config, self.ops, self.dtype = c, ops, parts.dtype
        self.vocab_size, self.max_model_len = c.vocab_size, c.max_model_len
        self.eos_token_ids = c.eos_token_ids or []
        self._quantization, self._device = quantization, parts.device
        placed = {"dtype": parts.dtype, "device": parts.device}
        self.embedding = VocabParallel(c.vocab_size, c.hidden_size, communicator, **placed)
        self.head = (
            self.embedding
            if c.tie_word_embeddings
            else VocabParallel(c.vocab_size, c.hidden_size, communicator, **placed)
        )
        self.layers = nn.ModuleList(Layer(parts, i) for i in range(c.num_hidden_layers))
        self.norm = parts.norm(c.hidden_size)
        for layer in self.layers:
            attention.check(layer.attention.spec)
        self._cos_sin = self._tables(c)

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
        return [tables[layer.attention.local] for layer in self.layers]

    # -- weights ------------------------------------------------------------------------------

    def targets(self) -> dict[str, Target]:
        """Every tensor that a checkpoint must bring, by its Hugging Face name."""
        found = self.embedding.targets("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            found |= layer.targets(f"model.layers.{i}")
        found |= self.norm.targets("model.norm")
        if self.head is not self.embedding:
            found |= self.head.targets("lm_head")
        return found

    @torch.no_grad()
    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        targets = self.targets()
        missing = set(targets)
        for name, tensor in weights:
            name = name.removeprefix("language_model.").replace("model.language_model.", "model.")
            target = targets.get(name)
            if target is None:
                self._unexpected(name, targets)
                continue
            if tuple(tensor.shape) != target.shape:
                raise CheckpointError(
                    f"tensor {name} has shape {list(tensor.shape)}, "
                    f"the config asks for {list(target.shape)}"
                )
            target.fill(tensor)
            missing.discard(name)
        # a checkpoint may leave out lm_head although its config does not say that it is tied
        if missing:
            names = sorted(missing)
            raise CheckpointError(
                f"the checkpoint lacks {len(names)} tensors: {', '.join(names[:5])}"
                + (", ..." if len(names) > 5 else "")
            )
        self.finalize()

    def _unexpected(self, name: str, targets: dict[str, Target]) -> None:
        """Refuse a tensor that nothing takes, but for those that are known to be no weights of
        ours."""
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        beyond = layer.isdigit() and int(layer) >= len(self.layers)
        tied_copy = name == "lm_head.weight" and self.head is self.embedding
        if beyond or tied_copy or name.endswith("rotary_emb.inv_freq") or ".vision" in name:
            return
        if name.startswith(("vision_tower.", "multi_modal_projector.", "model.vision_tower.")):
            return
        raise CheckpointError(
            f"tensor {name} is in the checkpoint but not in the model{nearest(name, targets)}"
        )

    @torch.no_grad()
    def load_random(self, seed: int) -> None:
        for name, target in self.targets().items():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            if target.kind == "norm":
                tensor = torch.full(target.shape, 1.0 - (self.config.norm_offset or 0.0))
            elif target.kind == "bias":
                tensor = torch.zeros(target.shape)
            else:
                tensor = torch.empty(target.shape).normal_(0, INIT_STD, generator=generator)
            target.fill(tensor)
        self.finalize()

    def finalize(self) -> None:
        """Hand the linear weights to the quantization; from here on the model can run."""
        self._weight_bytes = self._count_bytes()
        for module in self.modules():
            if isinstance(module, Linear | Experts):
                module.finalize(self._quantization)
        self.head.run = self._quantization.linear(self.head.weight, None, torch.float32)
        if self.head is not self.embedding:
            self.head.weight = self.head.weight[:0]

    def _count_bytes(self) -> int:
        total = 0
        for module in self.modules():
            if isinstance(module, Linear | Experts):
                total += module.num_bytes
            elif isinstance(module, Norm | VocabParallel):
                total += module.weight.nbytes
        return total

    def weight_bytes(self) -> int:
        return self._weight_bytes

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
            for i, layer in enumerate(self.layers)
        ]

    def forward(
        self, token_ids: Tensor, positions: Tensor, caches: Sequence[LayerCache], metadata: Any
    ) -> Tensor:
        x = self.embedding.embed(self.ops.embedding, token_ids)
        if self.config.embedding_multiplier is not None:
            # rounded to the weights' dtype first, as the models were trained
            x = x * torch.tensor(self.config.embedding_multiplier, dtype=x.dtype)
        residual: Tensor | None = None
        layer: Callable[..., tuple[Tensor, Tensor]]
        for layer, cos_sin, cache in zip(self.layers, self._cos_sin, caches, strict=True):
            x, residual = layer(x, residual, positions, cos_sin, cache, metadata)
        assert residual is not None
        return self.ops.add_rms_norm(x, residual, self.norm.weight, self.config.rms_norm_eps or 0)[
            0
        ]

    def logits(self, hidden: Tensor) -> Tensor:
        out = self.head.logits(hidden)
        if self.config.logits_scaling is not None:
            out = out / self.config.logits_scaling
        if (cap := self.config.final_logit_softcapping) is not None:
            out = cap * torch.tanh(out / cap)
        return out
