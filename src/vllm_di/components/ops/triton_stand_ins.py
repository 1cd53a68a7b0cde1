"""What runs in place of Triton's kernels on a simulated device: the torch reference.

A stand-in reads a launch's own arguments, pointers with the strides that stand beside them, so that
a wrong launch gives a wrong result here as it would there. What the kernel does with them, and how
it is cut into programs, is not shown: interpreter and compiler see to that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.ops.torch import TorchOps
from vllm_di.errors import ConfigError

REFERENCE = TorchOps()
MULTIPROCESSORS = 4
"""Of the simulated device: few, so that contexts are cut into few splits."""
Constants = Mapping[str, Any]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Called as ``kernels.triton.runtime.launch`` is. Raises ConfigError for tensors that lie on
    no simulated device."""
    module = torch.get_device_module(arguments[0].device)
    if not hasattr(module, "launch"):
        raise ConfigError(
            f"the tensors are on {arguments[0].device}, which is no simulated device; leave the "
            "key out, it follows device.simulated",
            key="ops.library.simulated",
        )
    stand_in = STAND_INS[kernel.__name__]
    module.launch(stand_in, grid, arguments, constants)


def _view(tensor: Tensor, shape: tuple[int, ...], *strides: int) -> Tensor:
    """The tensor that a kernel sees behind a pointer: contiguous in its last dimension."""
    return tensor.as_strided(shape, (*strides, 1), tensor.storage_offset())


def rms_norm(
    grid: tuple[int, ...],
    constants: Constants,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: int,
    inner: int,
    stride: int,
    inner_stride: int,
    size: int,
    eps: float,
) -> None:
    seen = _view(x, (rows // inner, inner, size), stride, inner_stride).reshape(rows, size)
    out.view(rows, size).copy_(REFERENCE.rms_norm(seen, weight, eps))


def add_rms_norm(
    grid: tuple[int, ...],
    constants: Constants,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    x_stride: int,
    residual_stride: int,
    size: int,
    eps: float,
) -> None:
    shape = (grid[0], size)
    x, residual = _view(x, shape, x_stride), _view(residual, shape, residual_stride)
    normed, total = REFERENCE.add_rms_norm(x, residual, weight, eps)
    x.copy_(normed)
    residual.copy_(total)


def rotary(
    grid: tuple[int, ...],
    constants: Constants,
    positions: Tensor,
    q: Tensor,
    k: Tensor,
    cos_sin: Tensor,
    q_stride: int,
    q_head_stride: int,
    k_stride: int,
    k_head_stride: int,
    num_heads: int,
    num_kv_heads: int,
    half: int,
) -> None:
    q = _view(q, (grid[0], num_heads, 2 * half), q_stride, q_head_stride)
    k = _view(k, (grid[0], num_kv_heads, 2 * half), k_stride, k_head_stride)
    turned = REFERENCE.rotary_embedding(positions, q, k, cos_sin, constants["INTERLEAVED"])
    q.copy_(turned[0])
    k.copy_(turned[1])


def gate(
    grid: tuple[int, ...], constants: Constants, out: Tensor, x: Tensor, stride: int, size: int
) -> None:
    op = REFERENCE.gelu_tanh_and_mul if constants["GELU"] else REFERENCE.silu_and_mul
    out.view(grid[0], size).copy_(op(_view(x, (grid[0], 2 * size), stride)))


def _cache(cache: Tensor, strides: tuple[int, ...], block: int, heads: int, size: int) -> Tensor:
    return _view(cache, (len(cache), heads, block, size), *strides)


def write_kv(
    grid: tuple[int, ...],
    constants: Constants,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    k_stride: int,
    k_head_stride: int,
    v_stride: int,
    v_head_stride: int,
    block_stride: int,
    head_stride: int,
    row_stride: int,
    block_size: int,
    num_kv_heads: int,
    head_size: int,
) -> None:
    shape = (grid[0], num_kv_heads, head_size)
    k, v = _view(k, shape, k_stride, k_head_stride), _view(v, shape, v_stride, v_head_stride)
    strides = (block_stride, head_stride, row_stride)
    keys = _cache(keys, strides, block_size, num_kv_heads, head_size)
    values = _cache(values, strides, block_size, num_kv_heads, head_size)
    REFERENCE.write_kv(k, v, keys, values, slots)


def rotary_write_kv(
    grid: tuple[int, ...],
    constants: Constants,
    positions: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    q_stride: int,
    q_head_stride: int,
    *rest: int,
) -> None:
    """``rest``: sizes of the cache write, the number of query heads, and ``half``."""
    *strides, block_size, num_heads, num_kv_heads, head_size, half = rest
    k_stride, k_head_stride = strides[:2]
    k = _view(k, (grid[0], num_kv_heads, head_size), k_stride, k_head_stride)
    q = _view(q, (grid[0], num_heads, 2 * half), q_stride, q_head_stride)
    turned_q, turned_k = REFERENCE.rotary_embedding(
        positions, q, k, cos_sin, constants["INTERLEAVED"]
    )
    q.copy_(turned_q)
    turned_k = turned_k.contiguous()
    strides[:2] = turned_k.stride()[:2]
    rest = (*strides, block_size, num_kv_heads, head_size)
    write_kv(grid, constants, turned_k, v, keys, values, slots, *rest)


def attention(
    grid: tuple[int, ...],
    constants: Constants,
    out: Tensor,
    partial: Tensor,
    stats: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    table: Tensor,
    scale: float,
    soft_cap: float,
    window: int,
    num_seqs: int,
    num_heads: int,
    q_stride: int,
    q_head_stride: int,
    *strides: int,
) -> None:
    """The first split takes the whole context; the others take nothing."""
    *cache_strides, table_stride = strides
    size, block_size, splits = (constants[n] for n in ("HEAD_SIZE", "PAGE", "SPLITS"))
    num_kv_heads = num_heads // constants["GROUP"]
    keys, values = (
        _cache(cache, tuple(cache_strides[at : at + 3]), block_size, num_kv_heads, size)
        for cache, at in ((keys, 0), (values, 3))
    )
    found = REFERENCE.paged_attention(
        _view(q, (len(out), num_heads, size), q_stride, q_head_stride),
        keys,
        values,
        starts,
        lengths[:num_seqs],
        _view(table, (num_seqs, table.shape[1]), table_stride),
        scale,
        window if constants["WINDOW"] else None,
        soft_cap if constants["SOFT_CAP"] else None,
    )
    if splits == 1:
        out.copy_(found)
        return
    stats[..., 0].fill_(float("-inf"))
    stats[..., 1].zero_()
    stats[:, :, 0, 0], stats[:, :, 0, 1] = 0.0, 1.0
    partial[:, :, 0].copy_(found)


def merge(
    grid: tuple[int, ...],
    constants: Constants,
    out: Tensor,
    partial: Tensor,
    stats: Tensor,
    starts: Tensor,
    num_seqs: int,
) -> None:
    best, total = stats.unbind(-1)  # [tokens, heads, splits]
    seen = best > float("-inf")
    peak = best.amax(-1, keepdim=True)
    weights = torch.where(seen, (best - torch.where(peak.isfinite(), peak, 0.0)).exp2(), 0.0)
    mixed = torch.where(seen[..., None], partial, 0.0) * weights[..., None]
    whole = (weights * total).sum(-1, keepdim=True)
    found = mixed.sum(2) / torch.where(whole == 0.0, 1.0, whole)
    count = int(starts[num_seqs])
    out[:count].copy_(found[:count])
    out[count:].zero_()


def experts(
    grid: tuple[int, ...],
    constants: Constants,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    starts: Tensor,
    num_experts: int,
    num_outputs: int,
    num_inputs: int,
    *strides: int,
) -> None:
    rows = _view(x, (len(order) // constants["PER_ROW"], num_inputs), strides[0])
    weights = _view(weight, (num_experts, num_outputs, num_inputs), *strides[1:])
    for expert, (first, end) in enumerate(itertools.pairwise(starts.tolist())):
        pairs = order[first:end]
        seen = rows[pairs // constants["PER_ROW"]]
        out[pairs] = REFERENCE.linear(seen, weights[expert])


def greedy(
    grid: tuple[int, ...], constants: Constants, out: Tensor, logits: Tensor, *sizes: int
) -> None:
    stride, vocab = sizes
    out.copy_(REFERENCE.greedy_sample(_view(logits, (grid[0], vocab), stride)))


def top_k_top_p(
    grid: tuple[int, ...],
    constants: Constants,
    out: Tensor,
    logits: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    stride: int,
    vocab: int,
) -> None:
    seen = _view(logits, (grid[0], vocab), stride)
    out.copy_(REFERENCE.top_k_top_p_sample(seen, top_k, top_p, min_p, uniform))


STAND_INS: dict[str, Callable[..., None]] = {
    "rms_norm_kernel": rms_norm,
    "add_rms_norm_kernel": add_rms_norm,
    "rotary_kernel": rotary,
    "gate_kernel": gate,
    "write_kv_kernel": write_kv,
    "rotary_write_kv_kernel": rotary_write_kv,
    "attention_kernel": attention,
    "merge_kernel": merge,
    "experts_kernel": experts,
    "greedy_kernel": greedy,
    "top_k_top_p_kernel": top_k_top_p,
}
