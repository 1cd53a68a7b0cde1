"""The op table as vLLM's layers call it: straight in eager mode, as torch ops in compiled mode.

vLLM's compiler traces a layer's Python. A kernel of this project's is called through ctypes; as a
torch op with a fake (shapes alone) it is one node of the graph. An op finds its engine's table by a
key that is the same in each start, since it stands in vLLM's compile cache.
"""

from __future__ import annotations

import functools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.interfaces import OpTable
from vllm_di.vllm import versions
from vllm_di.vllm.assembled import Assembled


class Calls:
    """The ops as the layers call them. Tensors of vLLM's are [tokens, heads * head_size]."""

    def __init__(self, table: OpTable, calls: Counter[str]) -> None:
        self._table, self._calls = table, calls

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self._calls["rms_norm"] += 1
        return self._table.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        self._calls["add_rms_norm"] += 1
        return self._table.add_rms_norm(x, residual, weight, eps)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        self._calls["silu_and_mul"] += 1
        return self._table.silu_and_mul(x)

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        self._calls["gelu_tanh_and_mul"] += 1
        return self._table.gelu_tanh_and_mul(x)

    def rotary_embedding(
        self,
        positions: Tensor,
        query: Tensor,
        key: Tensor,
        table: Tensor,
        head_size: int,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        self._calls["rotary_embedding"] += 1
        count = len(positions)
        q, k = self._table.rotary_embedding(
            positions,
            query.view(count, -1, head_size),
            key.view(count, -1, head_size),
            table,
            interleaved,
        )
        return q.reshape(query.shape), k.reshape(key.shape)


def calls_of(assembled: Assembled) -> Any:
    """The ops for the layers of the engine that vLLM builds right now."""
    calls = Calls(assembled.parts.ops, assembled.calls)
    if not versions.is_compiled(versions.current_config()):
        return calls
    ops = torch_ops()
    ops.held[assembled.key] = calls
    names = ("rms_norm", "add_rms_norm", "silu_and_mul", "gelu_tanh_and_mul", "rotary_embedding")
    return SimpleNamespace(
        **{name: functools.partial(getattr(ops, name), assembled.key) for name in names}
    )


@functools.cache
def torch_ops() -> SimpleNamespace:
    """Defines the torch ops, once a process. An op of the table may write into its inputs, which a
    torch op of this kind must not: it gets copies."""
    held: dict[str, Calls] = {}

    @torch.library.custom_op("vllm_di::rms_norm", mutates_args=())
    def rms_norm(engine: str, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return held[engine].rms_norm(x, weight, eps)

    @rms_norm.register_fake
    def _(engine: str, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    @torch.library.custom_op("vllm_di::add_rms_norm", mutates_args=())
    def add_rms_norm(
        engine: str, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return held[engine].add_rms_norm(x.clone(), residual.clone(), weight, eps)

    @add_rms_norm.register_fake
    def _(
        engine: str, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return (
            torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(residual.shape, dtype=residual.dtype, device=x.device),
        )

    def gate(name: str) -> Any:
        """The op ``name`` of x [..., 2 d]."""

        @torch.library.custom_op(f"vllm_di::{name}", mutates_args=())
        def gated(engine: str, x: Tensor) -> Tensor:
            out: Tensor = getattr(held[engine], name)(x)
            return out

        @gated.register_fake
        def _(engine: str, x: Tensor) -> Tensor:
            return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))

        return gated

    @torch.library.custom_op("vllm_di::rotary_embedding", mutates_args=())
    def rotary_embedding(
        engine: str,
        positions: Tensor,
        query: Tensor,
        key: Tensor,
        table: Tensor,
        head_size: int,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        return held[engine].rotary_embedding(
            positions,
            query.clone(memory_format=torch.contiguous_format),
            key.clone(memory_format=torch.contiguous_format),
            table,
            head_size,
            interleaved,
        )

    @rotary_embedding.register_fake
    def _(
        engine: str,
        positions: Tensor,
        query: Tensor,
        key: Tensor,
        table: Tensor,
        head_size: int,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        return (
            torch.empty(query.shape, dtype=query.dtype, device=query.device),
            torch.empty(key.shape, dtype=key.dtype, device=key.device),
        )

    return SimpleNamespace(
        held=held,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        silu_and_mul=gate("silu_and_mul"),
        gelu_tanh_and_mul=gate("gelu_tanh_and_mul"),
        rotary_embedding=rotary_embedding,
    )


@functools.cache
def linear_op() -> SimpleNamespace:
    """A product of a layer as a torch op, found by its engine and the layer's name."""
    held: dict[str, Any] = {}

    @torch.library.custom_op("vllm_di::linear", mutates_args=())
    def linear(layer: str, x: Tensor, outputs: int) -> Tensor:
        found: Tensor = held[layer](x)
        return found

    @linear.register_fake
    def _(layer: str, x: Tensor, outputs: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], outputs))

    return SimpleNamespace(held=held, linear=linear)


@functools.cache
def group_ops() -> SimpleNamespace:
    """The calls of a group's communicator as torch ops, found by their engine and the group's name.
    A reduction is done in place, which a torch op of this kind must not: it gets a copy."""
    held: dict[str, Any] = {}

    @torch.library.custom_op("vllm_di::all_reduce", mutates_args=())
    def all_reduce(group: str, x: Tensor) -> Tensor:
        found: Tensor = held[group].reduce(x.clone(memory_format=torch.contiguous_format))
        return found

    @all_reduce.register_fake
    def _(group: str, x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.custom_op("vllm_di::all_gather", mutates_args=())
    def all_gather(group: str, x: Tensor, dim: int, ranks: int) -> Tensor:
        found: Tensor = held[group].gather(x, dim).contiguous()
        return found

    @all_gather.register_fake
    def _(group: str, x: Tensor, dim: int, ranks: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] *= ranks
        return x.new_empty(shape)

    return SimpleNamespace(held=held, all_reduce=all_reduce, all_gather=all_gather)
