"""What the decoder is built from: attention and MLP blocks, wired from injected parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vllm_di.components.interfaces import (
    Activation,
    AttentionBackend,
    AttentionSpec,
    Communicator,
    Device,
    LayerCache,
    OpTable,
)
from vllm_di.models.config import DecoderConfig
from vllm_di.models.layers import Linear, Norm, Shard, Target, VocabParallel, shard, shard_heads
from vllm_di.models.moe import Experts


class Parts:
    """What every layer is built from."""

    def __init__(
        self,
        config: DecoderConfig,
        device: Device,
        ops: OpTable,
        attention: AttentionBackend,
        communicator: Communicator,
        *,
        quantized_experts: bool,
    ) -> None:
        self.config, self.quantized_experts = config.complete(), quantized_experts
        self.ops, self.attention, self.communicator = ops, attention, communicator
        self.rank, self.world = communicator.rank, communicator.world_size
        self.dtype, self.device = device.dtype(config.dtype), device.torch_device
        self.reduce = communicator.all_reduce
        """Sums the partial results of all ranks."""

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def linear(
        self,
        outputs: list[Shard],
        inputs: Shard,
        bias: bool | None,
        activation: Activation | None = None,
    ) -> Linear:
        """Outputs sharded, or none: each rank has its own."""
        return Linear(
            outputs,
            inputs,
            bias=bool(bias),
            activation=activation,
            dtype=self.dtype,
            device=self.device,
        )

    def row_parallel(self, output: Shard, inputs: Shard, bias: bool | None) -> Linear:
        """Inputs sharded: the ranks' results are to be summed, so that rank 0 alone adds the
        bias."""
        return Linear(
            [output],
            inputs,
            bias=bool(bias),
            adds_bias=self.rank == 0,
            dtype=self.dtype,
            device=self.device,
        )

    def norm(self, size: int) -> Norm:
        return Norm(
            size, offset=self.config.norm_offset or 0.0, dtype=self.dtype, device=self.device
        )

    def vocabulary(self) -> VocabParallel:
        c = self.config
        assert c.vocab_size and c.hidden_size
        return VocabParallel(
            c.vocab_size, c.hidden_size, self.communicator, dtype=self.dtype, device=self.device
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
        self.num_heads, self.num_kv_heads = query.size // c.head_dim, kv.size // c.head_dim
        self.qkv = parts.linear([query, kv, kv], parts.whole(c.hidden_size), c.attention_bias)
        self.out = parts.row_parallel(parts.whole(c.hidden_size), query, c.attention_output_bias)
        self.q_norm = parts.norm(c.head_dim) if c.qk_norm else None
        self.k_norm = parts.norm(c.head_dim) if c.qk_norm else None
        sliding = (c.layer_types or [])[layer] == "sliding_attention"
        self.window = c.sliding_window if sliding else None
        self.local = sliding and c.rope_local_theta is not None
        self.rotates = layer not in (c.no_rope_layers or [])
        self.fused = bool(c.fused_projections)
        self.spec = AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=c.head_dim,
            scale=c.attention_scale or c.head_dim**-0.5,
            window=self.window,
            soft_cap=c.attn_logit_softcapping,
        )
        self.eps = c.rms_norm_eps or 0.0
        self.ops, self.reduce = parts.ops, parts.reduce
        self.attend = parts.attention.forward
        fuses = "fused_qk_norm_rope" in parts.ops.fusions
        self.norms_and_rotates = fuses and self.rotates and self.q_norm is not None
        """In one op, which goes before the one that rotates and writes the cache: two calls a layer
        then, not three."""
        unrotated = self.rotates and not self.norms_and_rotates
        self.attend_unrotated = parts.attention.unrotated() if unrotated else None

    def targets(self, prefix: str) -> dict[str, Target]:
        names = [f"{prefix}.{p}_proj" for p in "qkv"]
        targets = (
            self.qkv.fused_target(f"{prefix}.qkv_proj") if self.fused else self.qkv.targets(names)
        )
        targets |= self.out.targets([f"{prefix}.o_proj"])
        if self.q_norm and self.k_norm:
            targets |= self.q_norm.targets(f"{prefix}.q_norm")
            targets |= self.k_norm.targets(f"{prefix}.k_norm")
        return targets

    def forward(
        self, x: Tensor, positions: Tensor, cos_sin: Tensor, cache: LayerCache, metadata: Any
    ) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        qkv = self.qkv.run(x)
        q, k, v = torch.split(qkv, self.sizes, -1)
        q = q.view(-1, self.num_heads, self.head_size)  # [tokens, heads, head_size]
        k = k.view(-1, self.num_kv_heads, self.head_size)
        v = v.view(-1, self.num_kv_heads, self.head_size)
        if self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.weight, self.k_norm.weight
            if self.norms_and_rotates:
                heads = self.num_heads, self.num_kv_heads
                q, k = self.ops.fused_qk_norm_rope(
                    positions, qkv, *heads, *weights, self.eps, cos_sin, False
                )
            else:
                q = self.ops.rms_norm(q, weights[0], self.eps)
                k = self.ops.rms_norm(k, weights[1], self.eps)
        if self.attend_unrotated is not None:
            mixed = self.attend_unrotated(positions, q, k, v, cos_sin, cache, metadata, self.spec)
        else:
            if self.rotates and not self.norms_and_rotates:
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
        self.gate_up = parts.linear(
            [inner, inner], parts.whole(c.hidden_size), c.mlp_bias, c.hidden_act
        )
        self.down = parts.row_parallel(parts.whole(c.hidden_size), inner, c.mlp_bias)
        self.fused = bool(c.fused_projections)
        self.reduce = parts.reduce
        ops = parts.ops
        self.act = ops.silu_and_mul if c.hidden_act == "silu" else ops.gelu_tanh_and_mul

    def targets(self, prefix: str) -> dict[str, Target]:
        if self.fused:
            targets = self.gate_up.fused_target(f"{prefix}.gate_up_proj")
        else:
            targets = self.gate_up.targets([f"{prefix}.gate_proj", f"{prefix}.up_proj"])
        return targets | self.down.targets([f"{prefix}.down_proj"])

    def forward(self, x: Tensor) -> Tensor:
        inner = self.gate_up.run(x)
        if not self.gate_up.is_gated:
            inner = self.act(inner)
        return self.reduce(self.down.run(inner))


class Layer(nn.Module):
    """Attention and MLP on a residual stream. ``forward`` returns (delta, residual); the next
    ``add_rms_norm`` adds them."""

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
        targets = self.attention.targets(f"{prefix}.self_attn")
        mixtral = isinstance(self.mlp, Experts) and self.mlp.block_sparse
        targets |= self.mlp.targets(f"{prefix}.{'block_sparse_moe' if mixtral else 'mlp'}")
        targets |= self.input_norm.targets(f"{prefix}.input_layernorm")
        if self.post_attention is None or self.post_mlp is None:
            return targets | self.mlp_norm.targets(f"{prefix}.post_attention_layernorm")
        targets |= self.post_attention.targets(f"{prefix}.post_attention_layernorm")
        targets |= self.mlp_norm.targets(f"{prefix}.pre_feedforward_layernorm")
        return targets | self.post_mlp.targets(f"{prefix}.post_feedforward_layernorm")

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        cos_sin: Tensor,
        cache: LayerCache,
        metadata: Any,
    ) -> tuple[Tensor, Tensor]:
        """x, residual [tokens, hidden] -> (delta, residual), of the same shape."""
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
