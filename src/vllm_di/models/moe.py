"""Mixture of experts: a router and the experts' weights, sharded inside each expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from vllm_di.components.interfaces import ExpertsFunction, Quantization
from vllm_di.components.quantized import QuantizedWeight
from vllm_di.models.layers import Cut, Target

if TYPE_CHECKING:
    from vllm_di.models.blocks import Parts

DOWN = -1
"""Stands for the row at which a part of ``gate_up`` starts."""


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
        self.takes_quantized = parts.quantized_experts
        self._quantized: dict[tuple[int, int], QuantizedWeight] = {}
        """Weights that came quantised, by expert and first row."""
        self._run: ExpertsFunction | None = None

    def targets(self, prefix: str) -> dict[str, Target]:
        found = self.router.targets([f"{prefix}.gate"])
        names = ("w1", "w3", "w2") if self.block_sparse else ("gate_proj", "up_proj", "down_proj")
        rows = (self.inner.whole, self.hidden)
        shards, cut = self.inner.count, self.inner.count > 1
        by_row = Cut(lambda: self._held(self.gate_up), 0 if cut else None, shards)
        by_column = Cut(lambda: self._held(self.down), 1 if cut else None, shards)
        kinds = (
            (rows, 0, by_row),
            (rows, self.inner.size, by_row),
            ((self.hidden, self.inner.whole), DOWN, by_column),
        )
        for e in range(self.num_experts):
            for name, (shape, start, how) in zip(names, kinds, strict=True):
                found[f"{prefix}.experts.{e}.{name}.weight"] = Target(
                    shape, self._filler(e, start), quantized=self.takes_quantized, cut=how
                )
        return found

    def _held(self, weights: Tensor) -> Tensor | None:
        return None if self.is_quantized else weights

    def _filler(self, expert: int, start: int) -> Callable[[Tensor | QuantizedWeight], None]:
        span = self.inner.span

        def fill(tensor: Tensor | QuantizedWeight) -> None:
            if isinstance(tensor, QuantizedWeight):
                share = tensor.columns(span) if start == DOWN else tensor.rows(span)
                self._quantized[expert, start] = share
            else:
                self._place(expert, start).copy_(tensor[:, span] if start == DOWN else tensor[span])

        return fill

    def _place(self, expert: int, start: int) -> Tensor:
        if start == DOWN:
            return self.down[expert]
        return self.gate_up[expert, start : start + self.inner.size]

    @property
    def is_mixed(self) -> bool:
        """Whether some weights came quantised and some in floats, or an expert's in several
        orders."""
        parts = self._quantized
        if len(parts) in (0, 3 * self.num_experts):
            return not all(
                QuantizedWeight.are_alike([parts[expert, start], parts[expert, self.inner.size]])
                for expert, start in parts
                if start == 0
            )
        return True

    @property
    def is_quantized(self) -> bool:
        """Once it is finalised: whether the quantization multiplies its weights."""
        return self._run is not None

    def finalize(self, quantization: Quantization) -> None:
        """Hand the weights of the experts over; the router is finalised as a Linear of its own."""
        gate_up: list[Tensor | QuantizedWeight] = [*self.gate_up]
        down: list[Tensor | QuantizedWeight] = [*self.down]
        if self.is_mixed:
            for (expert, start), part in self._quantized.items():
                self._place(expert, start).copy_(part.dequantize(self.down.dtype))
        elif parts := self._quantized:
            size, every = self.inner.size, range(self.num_experts)
            gate_up = [QuantizedWeight.join([parts[e, 0], parts[e, size]]) for e in every]
            down = [parts[e, DOWN] for e in every]
        self._quantized = {}
        self._run = quantization.experts(gate_up, down, self.activation)
        if self._run is not None:
            self.num_bytes = sum(quantization.num_bytes(weight) for weight in (*gate_up, *down))
            self._drop()

    def release(self) -> None:
        """Drop the experts' weights."""
        self._run = None
        self._drop()

    def _drop(self) -> None:
        self.gate_up, self.down = self.gate_up[:0].clone(), self.down[:0].clone()

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router.run(x).float().softmax(-1).topk(self.top_k)  # [tokens, k]
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        if self._run is not None:
            return self.reduce(self._run(x, weights, ids))
        return self.reduce(self.experts(x, self.gate_up, self.down, weights, ids, self.activation))
