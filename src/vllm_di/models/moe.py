"""Mixture of experts: a router and the experts' weights, sharded inside each expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from vllm_di.components.interfaces import Quantization
from vllm_di.models.layers import Cut, Target

if TYPE_CHECKING:
    from vllm_di.models.blocks import Parts


class Experts(nn.Module):
    """x [tokens, hidden] -> the weighted sum of the top experts' outputs."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        c = parts.config
        assert c.num_experts and c.num_experts_per_tok and c.hidden_size and c.moe_intermediate_size
        self.inner = parts.shard(c.moe_intermediate_size, "moe_intermediate_size")
        self.num_experts, self.hidden = c.num_experts, c.hidden_size
        self.top_k, self.renormalise = c.num_experts_per_tok, bool(c.norm_topk_prob)
        self.block_sparse = c.architecture == "MixtralForCausalLM"
        self.router = parts.linear([parts.whole(c.num_experts)], parts.whole(c.hidden_size), False)
        self.gate_up = parts.empty(c.num_experts, 2 * self.inner.size, c.hidden_size)
        self.down = parts.empty(c.num_experts, c.hidden_size, self.inner.size)
        self.num_bytes = self.gate_up.nbytes + self.down.nbytes
        self.experts = parts.ops.fused_experts
        self.activation: Literal["silu", "gelu_tanh"] = c.hidden_act or "silu"
        self.reduce = parts.reduce

    def targets(self, prefix: str) -> dict[str, Target]:
        found = self.router.targets([f"{prefix}.gate"])
        names = ("w1", "w3", "w2") if self.block_sparse else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = names
        rows = (self.inner.whole, self.hidden)
        shards, cut = self.inner.count, self.inner.count > 1
        by_row = Cut(lambda: self.gate_up, 0 if cut else None, shards)
        by_column = Cut(lambda: self.down, 1 if cut else None, shards)
        for e in range(self.num_experts):
            name = f"{prefix}.experts.{e}"
            found[f"{name}.{gate}.weight"] = Target(rows, self._rows(e, 0), cut=by_row)
            found[f"{name}.{up}.weight"] = Target(rows, self._rows(e, self.inner.size), cut=by_row)
            found[f"{name}.{down}.weight"] = Target(
                (self.hidden, self.inner.whole), self._down(e), cut=by_column
            )
        return found

    def _rows(self, expert: int, start: int) -> Callable[[Tensor], None]:
        def fill(tensor: Tensor) -> None:
            place = self.gate_up[expert, start : start + self.inner.size]
            place.copy_(tensor[self.inner.span])

        return fill

    def _down(self, expert: int) -> Callable[[Tensor], None]:
        def fill(tensor: Tensor) -> None:
            self.down[expert].copy_(tensor[:, self.inner.span])

        return fill

    def finalize(self, quantization: Quantization) -> None:
        """The router is finalised as a Linear of its own; the experts stay as they are."""

    def release(self) -> None:
        """Drop the experts' weights."""
        self.gate_up, self.down = self.gate_up[:0].clone(), self.down[:0].clone()

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router.run(x).float().softmax(-1).topk(self.top_k)  # [tokens, k]
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return self.reduce(self.experts(x, self.gate_up, self.down, weights, ids, self.activation))
