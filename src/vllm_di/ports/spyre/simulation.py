"""Stand-ins of Spyre's compiler and of its paged ops, on the host.

The compiler is not public. The stand-in refuses what its documentation, and the vendor's own
serving code, say that it refuses; what it gives is what torch gives.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vllm_di.components.ops.torch import attend
from vllm_di.components.vendor_operators import define_operators
from vllm_di.ports.spyre.attention import SCHEMAS
from vllm_di.ports.spyre.kv_layout import BLOCK


def define_ops() -> None:
    """Define the vendor's ops, unless its own package has."""
    if torch._C._jit_get_schemas_for_operator("spyre::paged_attn_store"):
        return
    define_operators(SCHEMAS, OPS)
    for name, fake in FAKES.items():
        torch.library.register_fake(name, fake)


def store_in_place(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor]:
    slots = slot_mapping.flatten()
    key_cache.flatten(0, 1)[slots] = key.flatten(0, 1).to(key_cache.dtype)
    value_cache.flatten(0, 1)[slots] = value.flatten(0, 1).to(value_cache.dtype)
    return key_cache, value_cache


def store(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor]:
    return store_in_place(key, value, key_cache.clone(), value_cache.clone(), slot_mapping)


def compute(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
    current_tkv_mask: Tensor,
    left_padded_prompt_mask: Tensor,
    block_table: Tensor,
) -> Tensor:
    """Queries are the last of the context from ``left_padded_prompt_mask`` to
    ``current_tkv_mask``; those for which there is no context give 0."""
    out = torch.zeros_like(query)
    lefts, ends = left_padded_prompt_mask.tolist(), current_tkv_mask.tolist()
    for row, (left, end) in enumerate(zip(lefts, ends, strict=True)):
        keys, values = (
            cache[block_table[row]].flatten(0, 1)[left:end].transpose(0, 1).to(query.dtype)
            for cache in (key_cache, value_cache)
        )
        count = min(query.shape[1], end - left)
        if count:
            out[row, -count:] = attend(query[row, -count:], keys, values, scale, None, None)
    return out


def _fake_store(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(key_cache), torch.empty_like(value_cache)


def _fake_compute(query: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(query)


OPS: dict[str, Callable[..., Any]] = {
    "spyre::paged_attn_store": store,
    "spyre::paged_attn_compute": compute,
}
FAKES: dict[str, Callable[..., Any]] = {
    "spyre::paged_attn_store": _fake_store,
    "spyre::paged_attn_compute": _fake_compute,
}

COMPILED = frozenset(
    {
        *("_softmax", "_to_copy", "_unsafe_view", "add", "addmm", "alias", "amax", "arange"),
        *("bitwise_and", "bitwise_not", "bmm", "cat", "clamp", "clone", "constant_pad_nd", "cos"),
        *("detach", "div", "embedding", "eq", "exp", "expand", "floor_divide", "full", "full_like"),
        *("ge", "gelu", "gt", "index", "index_select", "le", "lift_fresh_copy", "linear"),
        *("logical_and", "logical_not", "lt", "matmul", "maximum", "mean", "minimum", "mm", "mul"),
        *("native_layer_norm", "ne", "neg", "new_zeros", "ones", "permute", "pow", "reciprocal"),
        *("relu", "repeat_interleave", "reshape", "rsqrt", "rsub", "scalar_tensor", "scatter"),
        *("scatter_add", "select", "sigmoid", "silu", "sin", "slice", "split", "split_with_sizes"),
        *("sqrt", "squeeze", "stack", "sub", "sum", "t", "tanh", "topk", "transpose", "unbind"),
        *("unsqueeze", "view", "where", "zeros", "zeros_like"),
    }
)
"""Of ``aten``: elementwise ops, products, reductions, views, gathers. Nothing that works in place,
draws at random or has a size that depends on values."""


class Refused(RuntimeError):
    """The compiler's no."""


def sendnn(graph: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    """A backend of ``torch.compile``. The cache is donated: what is stored is written in its place.
    Raises Refused for free sizes, ops that are not in COMPILED, rows that are no whole blocks,
    other blocks than of 64, prompts beside decodes, and several prompts."""
    compute_op = torch.ops.spyre.paged_attn_compute.default
    store_op = torch.ops.spyre.paged_attn_store.default
    if torch.is_inference_mode_enabled():
        raise Refused("inference mode")
    phases = set()
    for node in graph.graph.nodes:
        _check_sizes(node)
        if node.op == "call_method" or node.op == "call_module":
            raise Refused(f"{node.op} {node.target}")
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if node.target is store_op:
            _check_cache(node.args[2])
            node.target = store_in_place
        elif node.target is compute_op:
            _check_cache(node.args[1])
            phases.add(_phase(node.args[0]))
        elif getattr(node.target, "namespace", "") != "aten" or (
            node.target._opname not in COMPILED
        ):
            raise Refused(f"the op {node.target} is not among those that it compiles")
    if len(phases) > 1:
        raise Refused(f"a step of several phases: {sorted(phases)}")
    graph.recompile()
    return graph.forward


def _check_sizes(node: Node) -> None:
    value = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(value, torch.SymInt) or (
        isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)
    ):
        raise Refused(f"{node.name} has a free size")


def _check_cache(node: Any) -> None:
    if (size := _shape(node)[1]) != BLOCK:
        raise Refused(f"blocks of {size} tokens, not of {BLOCK}")


def _phase(query: Any) -> str:
    seqs, queries = _shape(query)[:2]
    if queries == 1:
        return "decode"
    if seqs > 1:
        raise Refused(f"{seqs} sequences of {queries} tokens: prompts are compiled one at a time")
    if queries % BLOCK:
        raise Refused(f"a prompt of {queries} rows: they must be padded to blocks of {BLOCK}")
    return "prefill"


def _shape(node: Node) -> tuple[int, ...]:
    value: Any = node.meta.get("example_value", node.meta.get("val"))
    return tuple(value.shape)
