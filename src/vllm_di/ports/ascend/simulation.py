"""Stand-ins of the vendor's kernels for the simulated device, on host tensors.

Defined under the vendor's schemas, so that torch refuses a call that the vendor would, and written
from the vendor's documentation, with the restrictions that it names. They say nothing of the real
kernels' speed or rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.device.simulated import HostSimulation
from vllm_di.components.ops.torch import TorchOps, attend
from vllm_di.components.vendor_operators import define_operators, need
from vllm_di.kernels.simulated.module import SimulatedModule
from vllm_di.ports.ascend.vendor import SCHEMAS

FRACTAL_NZ = 29
_reference = TorchOps()


class AscendSimulation(HostSimulation):
    """An NPU with CANN and NNAL, as far as this port can tell."""

    def define_kernels(self, module: SimulatedModule) -> None:
        define_operators(SCHEMAS, KERNELS)


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    need(x.dtype == gamma.dtype, f"self is {x.dtype} and gamma {gamma.dtype}; they must be alike")
    need(2 <= x.dim() <= 8 and x.is_contiguous(), "self must be contiguous, of 2 to 8 dimensions")
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return _reference.rms_norm(x, gamma, epsilon), scale


def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    need(x1.shape == x2.shape and x1.dtype == x2.dtype, "x1 and x2 must be alike")
    total = x1 + x2
    out, scale = rms_norm(total, gamma, epsilon)
    return out, scale, total


def mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    *,
    mrope_section: list[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[Tensor, Tensor]:
    need(query.dtype == key.dtype == cos_sin_cache.dtype, "operands must be of one dtype")
    need(query.dim() == key.dim() == cos_sin_cache.dim() == 2, "operands must have 2 dimensions")
    multiple = 16 if query.dtype is torch.float32 else 32
    need(cos_sin_cache.shape[1] % multiple == 0, f"rotary dim must be a multiple of {multiple}")
    need(positions.dim() == 1 and not any(mrope_section or ()), "multimodal sections are not here")
    need(rotary_mode in ("half", "interleave") and cache_mode == "default", "unknown mode")
    q, k = (x.unflatten(1, (-1, head_size)) for x in (query, key))
    q, k = _reference.rotary_embedding(
        positions, q, k, cos_sin_cache.float(), rotary_mode == "interleave"
    )
    return q.flatten(1), k.flatten(1)


def rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    need(x.dim() == r1.dim() == r2.dim() == 4 and rotate is None, "operands must have 4 dimensions")
    need(x.dtype == r1.dtype == r2.dtype, "operands must be of one dtype")
    need(tuple(r1.shape) == (1, x.shape[1], 1, x.shape[3]), "r1 must be [1, S, 1, D]")
    need(x.shape[-1] % 2 == 0 and x.shape[-1] < 896, "D must be even and below 896")
    if rotary_mode == "half":
        a, b = x.chunk(2, -1)
        other = torch.cat([-b, a], -1)
    else:
        need(rotary_mode == "interleave", "unknown mode")
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * r1 + other * r2


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    need(x.is_contiguous() and x.shape[dim] % 2 == 0, "self must be contiguous and even along dim")
    gate, up = x.chunk(2, dim)
    return torch.nn.functional.silu(gate) * up


def geglu(
    x: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> tuple[Tensor, Tensor]:
    left, right = x.chunk(2, dim)
    gate, up = (left, right) if activate_left else (right, left)
    form = "tanh" if approximate else "none"
    activated = torch.nn.functional.gelu(gate, approximate=form)
    return activated * up, activated


def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    need(cache_mode == "Norm", "caches of the format NZ are not here; cache_mode must be Norm")
    need(key.dim() == 3 and slot_mapping.dim() == 1, "key must have 3 dimensions, slots one")
    need(slot_mapping.dtype in (torch.int32, torch.int64), "slots must be int32 or int64")
    need(all(t.is_contiguous() for t in (key, value, key_cache, value_cache)), "not contiguous")
    need(key.dtype == value.dtype == key_cache.dtype == value_cache.dtype, "dtypes must be alike")
    slots = slot_mapping.long()
    size = key_cache.shape[0] * key_cache.shape[1]
    need(bool(((slots >= 0) & (slots < size)).all()), f"slots must be from 0 to {size - 1}")
    need(len(slots.unique()) == len(slots), "slots must not repeat")
    key_cache.flatten(0, 1)[slots] = key
    value_cache.flatten(0, 1)[slots] = value


def fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    **others: object,
) -> tuple[Tensor, Tensor]:
    """Paged, causal, in the layouts TND and BSND: what this port asks for."""
    given = [name for name, other in others.items() if isinstance(other, Tensor)]
    need(not given, f"{', '.join(given)}: not here")
    need(query.dtype in (torch.float16, torch.bfloat16), f"query must not be {query.dtype}")
    need(query.dtype == key.dtype == value.dtype, "dtypes must be alike")
    need(query.is_contiguous() and key.is_contiguous() and value.is_contiguous(), "not contiguous")
    need(input_layout in ("TND", "BSND"), f"layout {input_layout} is not here")
    need(sparse_mode == 3 and atten_mask is not None, "the causal mode and its mask are wanted")
    assert atten_mask is not None
    triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    need(atten_mask.dtype in (torch.bool, torch.int8, torch.uint8), "atten_mask: wrong dtype")
    need(torch.equal(atten_mask.bool(), triangle), "atten_mask must be the triangle of 2048 rows")
    need(block_table is not None and block_table.dtype is torch.int32, "block_table must be int32")
    assert block_table is not None and actual_seq_lengths and actual_seq_lengths_kv
    need(128 <= block_size <= 512 and block_size % 128 == 0, f"block_size {block_size}")
    heads, head_size = query.shape[-2:]
    kv_heads = num_key_value_heads or num_heads
    need(heads == num_heads and heads % kv_heads == 0 and heads // kv_heads <= 64, "heads")
    need(tuple(key.shape[1:]) == (block_size, kv_heads * head_size), "the cache's shape")
    packed = input_layout == "TND"
    if packed:
        need(head_size in (128, 192), f"layout TND takes heads of 128 or 192, not {head_size}")
        ends = list(actual_seq_lengths)
        need(ends == sorted(ends) and ends[-1] == len(query), "actual_seq_lengths must be sums")
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
    else:
        need(len(query) == 1, "one sequence a call, here")
        need(list(actual_seq_lengths) == [query.shape[1]], "actual_seq_lengths")
        spans = [(0, query.shape[1])]
    need(len(block_table) == len(spans) == len(actual_seq_lengths_kv), "numbers of sequences")
    flat = query if packed else query[0]
    out = torch.empty_like(flat)
    for row, (start, end) in enumerate(spans):
        keys, values = (
            _gather(c.unflatten(2, (kv_heads, head_size)), block_table[row], length)
            for c, length in (
                (key, actual_seq_lengths_kv[row]),
                (value, actual_seq_lengths_kv[row]),
            )
        )
        out[start:end] = attend(flat[start:end], keys, values, scale, None, None)
    return out.view(query.shape), torch.empty(0, dtype=torch.float32)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    context_lens: list[int],
    *,
    value_cache: Tensor | None = None,
    mask: Tensor | None = None,
    num_kv_heads: int = 0,
    num_heads: int = 0,
    scale_value: float = 1.0,
    mask_type: int = 0,
    workspace: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    need(query.dtype in (torch.float16, torch.bfloat16), f"query must not be {query.dtype}")
    need(mask is None and mask_type == 0 and value_cache is not None, "masks are not here")
    assert value_cache is not None
    need(block_table.dtype is torch.int32 and block_table.dim() == 2, "block_table must be int32")
    need(len(query) == len(block_table) == len(context_lens), "numbers of sequences")
    need(query.shape[1] == num_heads and key_cache.shape[2] == num_kv_heads, "heads")
    need(query.is_contiguous() and out.is_contiguous() and out.shape == query.shape, "out")
    for row, length in enumerate(context_lens):
        keys, values = (_gather(c, block_table[row], length) for c in (key_cache, value_cache))
        out[row : row + 1] = attend(query[row : row + 1], keys, values, scale_value, None, None)
    return out


def paged_attention_workspace(query: Tensor, *others: object, **named: object) -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def format_cast(x: Tensor, acl_format: int, **others: object) -> Tensor:
    """The layout in memory is the device's own business: the values are the same."""
    need(acl_format == FRACTAL_NZ and x.dtype is not torch.float32, f"format {acl_format}")
    return x.clone()


def _gather(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """cache [blocks, block_size, kv_heads, head_size] -> [kv_heads, length, head_size]."""
    used = blocks[: -(-length // cache.shape[1])].long()
    return cache[used].flatten(0, 1)[:length].transpose(0, 1)


KERNELS: dict[str, Callable[..., Any]] = {
    "npu::npu_rms_norm": rms_norm,
    "npu::npu_add_rms_norm": add_rms_norm,
    "npu::npu_mrope": mrope,
    "npu::npu_rotary_mul": rotary_mul,
    "npu::npu_swiglu": swiglu,
    "npu::npu_geglu": geglu,
    "npu::npu_scatter_pa_kv_cache": scatter_pa_kv_cache,
    "npu::npu_fused_infer_attention_score": fused_infer_attention_score,
    "npu::npu_format_cast": format_cast,
    "atb::_npu_paged_attention_v2.out": paged_attention,
    "atb::_npu_paged_attention_v2_get_workspace": paged_attention_workspace,
}
