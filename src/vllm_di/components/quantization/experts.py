"""Experts with quantised weights, by the same products as linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from vllm_di.components.interfaces import Activation, ExpertsFunction, OpTable
from vllm_di.components.quantization.products import QuantizedProducts
from vllm_di.components.quantized import QuantizedWeight

Product = Callable[[Tensor], Tensor]


class QuantizedExperts:
    """One pass over the experts that have tokens, each with its own tokens alone. Which they are is
    read on the host; where steps are traced, all experts see all tokens instead, as two products,
    and what they were not chosen for counts nothing."""

    def __init__(self, ops: OpTable) -> None:
        self._ops, self._products = ops, QuantizedProducts(ops)
        owner = ops.library_of("fused_experts")
        self.asks_host = (
            owner is None or "compile" not in owner.reuses or "fused_experts" in owner.asks_host
        )

    def function(
        self,
        gate_up: Iterable[QuantizedWeight],
        down: Iterable[QuantizedWeight],
        activation: Activation,
    ) -> ExpertsFunction:
        """As ``Quantization.experts``; a weight is packed before the next one is asked for."""
        act = self._ops.silu_and_mul if activation == "silu" else self._ops.gelu_tanh_and_mul
        if not self.asks_host:
            return self._on_all_tokens(list(gate_up), list(down), act)
        inner = [self._gated(weight, activation, act) for weight in gate_up]
        outer = [self._products.linear(weight, None, torch.float32) for weight in down]
        return _on_their_tokens(inner, outer)

    def _gated(self, weight: QuantizedWeight, activation: Activation, act: Product) -> Product:
        fused = self._products.gated_linear(weight, None, activation)
        if fused is not None:
            return fused
        product = self._products.linear(weight, None, None)
        return lambda x: act(product(x))

    def _on_all_tokens(
        self, gate_up: Sequence[QuantizedWeight], down: Sequence[QuantizedWeight], act: Product
    ) -> ExpertsFunction:
        num_experts = len(down)
        if any(weight.order is not None for weight in (*gate_up, *down)):
            return self._one_by_one(gate_up, down, act)
        inner = self._products.linear(QuantizedWeight.join(gate_up), None, None)
        outer = self._products.linear(QuantizedWeight.beside(down), None, torch.float32)

        def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
            shares = x.new_zeros((x.shape[0], num_experts), dtype=torch.float32)
            shares = shares.scatter_add(1, topk_ids, topk_weights.float())
            wide = act(inner(x).unflatten(-1, (num_experts, -1)))  # [tokens, experts, inter]
            mixed = (wide.float() * shares[..., None]).to(x.dtype)
            return outer(mixed.flatten(1)).to(x.dtype)

        return run

    def _one_by_one(
        self, gate_up: Sequence[QuantizedWeight], down: Sequence[QuantizedWeight], act: Product
    ) -> ExpertsFunction:
        """Of weights in act-order, each in its own."""
        inner = [self._products.linear(weight, None, None) for weight in gate_up]
        outer = [self._products.linear(weight, None, torch.float32) for weight in down]

        def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
            shares = x.new_zeros((x.shape[0], len(outer)), dtype=torch.float32)
            shares = shares.scatter_add(1, topk_ids, topk_weights.float())
            parts = [
                outer[expert](act(inner[expert](x))) * shares[:, expert, None]
                for expert in range(len(outer))
            ]
            return torch.stack(parts).sum(0).to(x.dtype)

        return run


def _on_their_tokens(inner: Sequence[Product], outer: Sequence[Product]) -> ExpertsFunction:
    def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        out = x.new_zeros(x.shape, dtype=torch.float32)
        chosen = topk_ids.flatten()
        pairs = chosen.argsort(stable=True)  # by expert, a token's own in order
        tokens = pairs // topk_ids.shape[1]
        shares = topk_weights.float().flatten()[pairs, None]
        start = 0
        for expert, count in enumerate(chosen.bincount(minlength=len(outer)).tolist()):
            if not count:
                continue
            its = slice(start, start + count)
            start += count
            y = outer[expert](inner[expert](x.index_select(0, tokens[its])))
            out.index_add_(0, tokens[its], y.mul_(shares[its]))
        return out.to(x.dtype)

    return run
