"""Stand-ins of vllm-xpu-kernels for the simulated device, on host tensors.

Defined under the package's schemas, so that torch refuses a call that it would, with the
restrictions of its sources. They say nothing of the real kernels' speed or rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.device.simulated import HostSimulation
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.vendor_operators import define_operators, need
from vllm_di.kernels.simulated.module import SimulatedModule
from vllm_di.ports.xpu.vendor import SCHEMAS

_reference = TorchOps()


class XpuSimulation(HostSimulation):
    """An Intel GPU with vllm-xpu-kernels, as far as this port can tell."""

    def define_kernels(self, module: SimulatedModule) -> None:
        define_operators(SCHEMAS, KERNELS)


def rms_norm(result: Tensor, x: Tensor, weight: Tensor | None, epsilon: float) -> None:
    need(result.is_contiguous() and x.stride(-1) == 1, "result must be contiguous, rows too")
    need(2 <= x.dim() <= 4 and x.numel() > 0, "input must have 2 to 4 dimensions and rows")
    need(weight is not None and weight.dtype == x.dtype == result.dtype, "dtypes must be alike")
    assert weight is not None
    result.view(x.shape).copy_(_reference.rms_norm(x, weight, epsilon))


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> None:
    need(x.dim() >= 2 and residual.is_contiguous(), "residual must be contiguous, input of rows")
    need(weight is not None and weight.dtype == x.dtype == residual.dtype, "dtypes must be alike")
    assert weight is not None
    residual.add_(x)
    x.copy_(_reference.rms_norm(residual, weight, epsilon))


def silu_and_mul(result: Tensor, x: Tensor) -> None:
    need(result.is_contiguous() and x.is_contiguous(), "rows are read as if they had no gaps")
    result.copy_(_reference.silu_and_mul(x))


def gelu_tanh_and_mul(out: Tensor, x: Tensor) -> None:
    need(out.is_contiguous() and x.is_contiguous(), "rows are read as if they had no gaps")
    out.copy_(_reference.gelu_tanh_and_mul(x))


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
) -> None:
    need(key is not None and positions.dim() == 1, "a key, and positions of one dimension, here")
    assert key is not None
    need(len(query) == len(key) == len(positions) > 0, "numbers of tokens")
    need(query.dtype == key.dtype == cos_sin_cache.dtype, "the table is read in the query's dtype")
    need(query.dim() == key.dim() == 3 and query.shape[2] == head_size, "heads")
    need(query.stride(1) == key.stride(1), "the key's heads are as far apart as the query's")
    need(positions.is_contiguous() and cos_sin_cache.is_contiguous(), "not contiguous")
    turned = _reference.rotary_embedding(positions, query, key, cos_sin_cache.float(), not is_neox)
    for old, new in zip((query, key), turned, strict=True):
        old.copy_(new)


def fused_qk_norm_rope(
    qkv: Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    position_ids: Tensor,
    forced_token_heads_per_warp: int = -1,
) -> None:
    need(qkv.dtype in (torch.bfloat16, torch.float16), f"qkv must not be {qkv.dtype}")
    need(qkv.dtype == q_weight.dtype == k_weight.dtype, "dtypes must be alike")
    need(head_dim in (64, 128, 256, 512), f"unsupported head dimension {head_dim}")
    given = (qkv, position_ids, q_weight, k_weight, cos_sin_cache)
    need(all(tensor.is_contiguous() for tensor in given), "not contiguous")
    need(position_ids.dtype == torch.int64 and position_ids.dim() == 1, "position_ids")
    heads = num_heads_q + num_heads_k + num_heads_v
    need(tuple(qkv.shape) == (len(position_ids), heads * head_dim), "the shape of qkv")
    rotary = cos_sin_cache.shape[1]
    need(rotary % 2 == 0 and rotary <= head_dim, "the size of the table")
    # lanes exchange elements by a bit of their number: other sizes give wrong numbers there
    lanes = rotary // 2 * 32 / head_dim
    need(lanes in (1, 2, 4, 8, 16), f"{rotary} rotated elements of {head_dim}: lanes do not pair")
    parts = qkv.view(len(qkv), heads, head_dim)
    q, k = parts[:, :num_heads_q], parts[:, num_heads_q : num_heads_q + num_heads_k]
    turned = _reference.rotary_embedding(
        position_ids,
        _reference.rms_norm(q.float(), q_weight.float(), eps),
        _reference.rms_norm(k.float(), k_weight.float(), eps),
        cos_sin_cache.float(),
        not is_neox,
    )
    for old, new in zip((q, k), turned, strict=True):
        old.copy_(new)


KERNELS: dict[str, Callable[..., Any]] = {
    "_C::rms_norm": rms_norm,
    "_C::fused_add_rms_norm": fused_add_rms_norm,
    "_C::silu_and_mul": silu_and_mul,
    "_C::gelu_tanh_and_mul": gelu_tanh_and_mul,
    "_C::rotary_embedding": rotary_embedding,
    "_C::fused_qk_norm_rope": fused_qk_norm_rope,
}
