"""A traced step, torch ops, as a function of JAX's arrays. Imported late, for JAX's sake."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.fx import GraphModule, Node

from vllm_di.errors import ConfigError
from vllm_di.ports.tpu.arrays import DTYPES

aten = torch.ops.aten
Lowering = Callable[..., Any]


def _dtype(dtype: torch.dtype | None) -> Any:
    return None if dtype is None else DTYPES[dtype]


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    places = [slice(None)] * x.ndim
    places[dim] = slice(start, None if end is None else min(end, x.shape[dim]), step)
    return x[tuple(places)]


def _split(x: Any, size: int | Sequence[int], dim: int = 0) -> list[Any]:
    total = x.shape[dim]
    sizes = [size] * (total // size) if isinstance(size, int) else list(size)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return list(jnp.split(x, [end for end in ends if end < total], axis=dim))


def _expand(x: Any, sizes: Sequence[int], **_: Any) -> Any:
    shape = [1] * (len(sizes) - x.ndim) + list(x.shape)
    wanted = [old if size == -1 else size for old, size in zip(shape, sizes, strict=True)]
    return jnp.broadcast_to(x.reshape(shape), wanted)


def _unsqueeze(x: Any, dim: int) -> Any:
    return jnp.expand_dims(x, dim)


def _squeeze(x: Any, dim: int) -> Any:
    return jnp.squeeze(x, dim) if x.shape[dim] == 1 else x


def _index(x: Any, places: Sequence[Any]) -> Any:
    return x[tuple(slice(None) if place is None else place for place in places)]


def _scatter_add(x: Any, dim: int, index: Any, source: Any) -> Any:
    places = list(jnp.indices(index.shape, sparse=True))
    places[dim] = index
    return x.at[tuple(places)].add(source)


def _top_k(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if dim not in (-1, x.ndim - 1) or not largest:
        raise ConfigError("aten.topk: along the last dimension and of the largest alone")
    return jax.lax.top_k(x, k)


def _product(a: Any, b: Any) -> Any:
    return jnp.matmul(a, b, preferred_element_type=a.dtype)


def _add(a: Any, b: Any, alpha: float = 1) -> Any:
    return a + (b if alpha == 1 else b * alpha)


def _sub(a: Any, b: Any, alpha: float = 1) -> Any:
    return a - (b if alpha == 1 else b * alpha)


def _to(x: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return x if dtype is None else x.astype(_dtype(dtype))


def _clamp(x: Any, least: Any = None, most: Any = None) -> Any:
    return jnp.clip(x, least, most)


def _zeros_of(x: Any, shape: Sequence[int], dtype: torch.dtype | None = None, **_: Any) -> Any:
    return jnp.zeros(shape, _dtype(dtype) or x.dtype)


def _arange(end: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return jnp.arange(end, dtype=_dtype(dtype))


def _mean(x: Any, dims: Any, keep: bool = False, dtype: torch.dtype | None = None) -> Any:
    return jnp.mean(_to(x, dtype), tuple(dims), keepdims=keep)


def _sum(x: Any, dims: Any, keep: bool = False, dtype: torch.dtype | None = None) -> Any:
    return jnp.sum(_to(x, dtype), None if dims is None else tuple(dims), keepdims=keep)


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


TABLE: Mapping[Any, Lowering] = {
    aten._softmax.default: lambda x, dim, _: jax.nn.softmax(x, dim),
    aten._to_copy.default: _to,
    aten._unsafe_view.default: jnp.reshape,
    aten.add.Tensor: _add,
    aten.addmm.default: lambda bias, a, b: bias + _product(a, b),
    aten.alias.default: _same,
    aten.arange.default: _arange,
    aten.bitwise_and.Tensor: operator.and_,
    aten.bmm.default: _product,
    aten.cat.default: lambda parts, dim=0: jnp.concatenate(parts, dim),
    aten.clamp.default: _clamp,
    aten.clone.default: _same,
    aten.div.Tensor: operator.truediv,
    aten.embedding.default: lambda weight, ids, *_: weight[ids],
    aten.expand.default: _expand,
    aten.ge.Scalar: operator.ge,
    aten.gelu.default: lambda x, approximate="none": jax.nn.gelu(x, approximate == "tanh"),
    aten.gt.Tensor: operator.gt,
    aten.index.Tensor: _index,
    aten.le.Tensor: operator.le,
    aten.lt.Tensor: operator.lt,
    aten.mean.dim: _mean,
    aten.mm.default: _product,
    aten.mul.Tensor: operator.mul,
    aten.neg.default: operator.neg,
    aten.new_zeros.default: _zeros_of,
    aten.permute.default: jnp.transpose,
    aten.pow.Tensor_Scalar: lambda x, power: x * x if power == 2 else x**power,
    aten.rsqrt.default: jax.lax.rsqrt,
    aten.scalar_tensor.default: lambda value, dtype=None, **_: jnp.asarray(value, _dtype(dtype)),
    aten.scatter_add.default: _scatter_add,
    aten.silu.default: jax.nn.silu,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.squeeze.dim: _squeeze,
    aten.sub.Tensor: _sub,
    aten.sum.dim_IntList: _sum,
    aten.sym_size.int: lambda x, dim: x.shape[dim],
    aten.t.default: jnp.transpose,
    aten.tanh.default: jnp.tanh,
    aten.topk.default: _top_k,
    aten.transpose.int: jnp.swapaxes,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: jnp.reshape,
    aten.where.self: jnp.where,
}
"""The torch ops of a traced step."""


def check_lowerings(graph: GraphModule, mark: Any) -> None:
    """Raise ConfigError that names every op without a lowering."""
    calls = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    unknown = sorted(str(t) for t in calls if t not in TABLE and t != mark and not _is_plain(t))
    if unknown:
        raise ConfigError(
            f"the step has no lowering for {', '.join(unknown)}: the model, or the attention, "
            "takes another platform"
        )


def lower(
    graph: GraphModule,
    mark: Any,
    attend: Lowering,
    given: Sequence[Node],
    wanted: Sequence[Node],
) -> Callable[[Mapping[str, Any], Sequence[Any]], tuple[list[Any], dict[Node, Any]]]:
    """The part of the graph that makes ``wanted`` from ``given`` -> f(constants by attribute, the
    values of ``given``): the values of ``wanted``, and those of all nodes, in which a cache is what
    ``attend`` gave back where ``mark`` stands."""
    needed: set[Node] = set()
    open_nodes = list(wanted)
    while open_nodes:
        node = open_nodes.pop()
        if node not in needed:
            needed.add(node)
            open_nodes += () if node in given else node.all_input_nodes
    nodes = [node for node in graph.graph.nodes if node in needed and node not in given]

    def run(
        constants: Mapping[str, Any], values: Sequence[Any]
    ) -> tuple[list[Any], dict[Node, Any]]:
        found: dict[Node, Any] = dict(zip(given, values, strict=True))
        for node in nodes:
            if node.op == "get_attr":
                found[node] = constants[node.target]
                continue
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
            if node.target == mark:
                found[node], found[node.args[3]] = attend(*args, **kwargs)
            else:
                found[node] = TABLE.get(node.target, node.target)(*args, **kwargs)
        return [found[node] for node in wanted], found

    return run


def _is_plain(target: Any) -> bool:
    """Whether it is arithmetic on sizes."""
    return getattr(target, "__module__", "") in ("_operator", "math", "builtins")
