"""Ops as Triton kernels, for the GPUs that Triton compiles for. GEMMs are torch's, which calls the
vendor's library (cuBLAS, hipBLASLt, oneDNN)."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from vllm_di.components import products
from vllm_di.components.interfaces import Activation, OpLibrary
from vllm_di.components.ops import triton_stand_ins
from vllm_di.components.ops.torch import TorchOps
from vllm_di.errors import ConfigError, PortError

log = logging.getLogger(__name__)
Launch = Callable[..., None]
"""(kernel, grid, arguments, constants, num_warps, num_stages)"""
KERNELS = ("attention", "elementwise", "experts", "norms", "sampling", "tiles", "runtime")
LARGEST_HEAD = 256
LEAST_SPLIT = 128
"""The fewest keys that are worth a separate program."""
MOST_SPLITS = 64


class TritonOps(OpLibrary):
    """fp32, fp16 and bf16. Kernels are compiled at their first launch and kept in Triton's cache.

    ``programs`` is how many programs of a kernel keep the device busy; null: four for each of its
    multiprocessors. Attention cuts long contexts until it has that many. ``num_stages`` is how many
    of attention's loads are in flight; null: what ``kernels.triton.tiles`` has for the device's
    architecture, which also cuts attention's tiles. ``simulated``: the device is simulated, and the
    torch reference stands in for each kernel.
    """

    reuses = frozenset({"capture"})
    launch: Launch
    """The launcher. Tests replace it, to compile for another target or to record."""

    def __init__(
        self,
        *,
        programs: Annotated[int, msgspec.Meta(ge=1)] | None,
        num_stages: Annotated[int, msgspec.Meta(ge=1, le=8)] | None,
        simulated: bool = False,
    ) -> None:
        try:
            found = [importlib.import_module(f"vllm_di.kernels.triton.{name}") for name in KERNELS]
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise PortError(
                "ops=triton: the package triton is not installed; pip install 'vllm-di[cuda]' or "
                "'vllm-di[rocm]'; an XPU build of torch brings Intel's own"
            ) from error
        self._attention, self._elementwise, self._experts = found[:3]
        self._norms, self._sampling, tiles, runtime = found[3:]
        self.launch = runtime.launch
        self._power: Callable[[int], int] = runtime.power_of_2
        self._interpreted: bool = runtime.is_interpreted()
        self._num_multiprocessors: Callable[[], int] = runtime.num_multiprocessors
        self._tiling_of: Callable[[str], tuple[str, Any]] = tiles.tiling_of
        self._architecture_of_device: Callable[[], str] = runtime.architecture
        self._programs, self._num_stages = programs, num_stages
        self._reference = TorchOps()
        self._where = f"triton ({runtime.VERSION})"
        self._simulated = simulated
        if simulated:
            self.launch = triton_stand_ins.launch
            self._num_multiprocessors = lambda: triton_stand_ins.MULTIPROCESSORS
            self._architecture_of_device = lambda: "sm_90"
            self._where = "simulated: the reference stands in for the Triton kernel"

    def describe(self) -> dict[str, str]:
        """Op to where it runs, or to the reason why it has no kernel here."""
        rows = {op: self._where if op in self.methods else "no Triton kernel" for op in self.OPS}
        return rows | {"linear": "the vendor's library of products, through torch"}

    # -- norms, rotary, gates -------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        shape, strides, size = x.shape, x.stride(), x.shape[-1]
        if x.dim() > 3 or strides[-1] != 1:
            x = x.contiguous()
            rows, inner, stride, inner_stride = x.numel() // max(size, 1), 1, size, 0
        elif x.dim() == 3:  # heads within tokens
            rows, inner, stride, inner_stride = shape[0] * shape[1], shape[1], *strides[:2]
        else:
            rows, inner, inner_stride = x.numel() // max(size, 1), 1, 0
            stride = strides[0] if x.dim() == 2 else 0
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        block = self._power(size)
        at_once = max(1, 2048 // block) if rows > 64 else 1
        if rows:
            self.launch(
                self._norms.rms_norm_kernel,
                (-(-rows // at_once),),
                (out, x, weight, rows, inner, stride, inner_stride, size, eps),
                {"ROWS": at_once, "BLOCK": block},
                num_warps=_warps(block * at_once),
            )
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """In place: the sum is written to the memory of ``residual``, its norm to that of ``x``."""
        if x.dim() != 2 or x.stride(1) != 1 or residual.stride(1) != 1 or x.dtype != residual.dtype:
            total = x + residual
            return self.rms_norm(total, weight, eps), total
        size = x.shape[1]
        block = self._power(size)
        if len(x):
            self.launch(
                self._norms.add_rms_norm_kernel,
                (len(x),),
                (x, residual, weight, x.stride(0), residual.stride(0), size, eps),
                {"BLOCK": block},
                num_warps=_warps(block),
            )
        return x, residual

    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        """In place."""
        half = cos_sin.shape[1] // 2
        if len(q):
            self.launch(
                self._elementwise.rotary_kernel,
                (len(q),),
                (
                    *(positions, q, k, cos_sin, *q.stride()[:2], *k.stride()[:2]),
                    *(q.shape[1], k.shape[1], half),
                ),
                {
                    "HEADS": self._power(q.shape[1]),
                    "KV_HEADS": self._power(k.shape[1]),
                    "HALF": self._power(half),
                    "INTERLEAVED": interleaved,
                },
                num_warps=self._tiling.token_warps,
            )
        return q, k

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return self._gate(x, gelu=False)

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        return self._gate(x, gelu=True)

    def _gate(self, x: Tensor, *, gelu: bool) -> Tensor:
        size = x.shape[-1] // 2
        rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
        out = torch.empty(*x.shape[:-1], size, dtype=x.dtype, device=x.device)
        block = min(1024, self._power(size))
        if out.numel():
            self.launch(
                self._elementwise.gate_kernel,
                (len(rows), -(-size // block)),
                (out, rows, rows.stride(0), size),
                {"GELU": gelu, "BLOCK": block},
            )
        return out

    # -- GEMMs ----------------------------------------------------------------------------------

    def pack_linear(self, weight: Tensor) -> Tensor:
        if weight.is_cpu and not self._interpreted:
            raise ConfigError(
                "ops=triton runs on an accelerator, and the weights are on the host; "
                "choose a platform that has one, or ops=cpu",
                key="ops",
            )
        return weight

    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if out_dtype is None or out_dtype == x.dtype:
            return products.linear(x, weight, bias)
        if (
            out_dtype != torch.float32 or x.is_cpu or self._simulated
        ):  # torch has it for accelerators alone
            return self._reference.linear(x, weight, bias, out_dtype)
        out = products.wide_product(x, weight)
        return out if bias is None else out + bias

    # -- experts --------------------------------------------------------------------------------

    def fused_experts(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Activation,
    ) -> Tensor:
        tokens, k = topk_ids.shape
        if not tokens:
            return torch.empty_like(x)
        ids, order = topk_ids.flatten().sort(stable=True)
        experts = torch.arange(len(gate_up) + 1, dtype=ids.dtype, device=ids.device)
        starts = torch.searchsorted(ids, experts, out_int32=True)
        hidden = self._product_of_experts(x, gate_up, order, starts, k)
        hidden = self._gate(hidden, gelu=activation != "silu")
        hidden = self._product_of_experts(hidden, down, order, starts, 1)
        shares = topk_weights.float().unsqueeze(-1)
        out: Tensor = (hidden.unflatten(0, (tokens, k)).float() * shares).sum(1)
        return out.to(x.dtype)

    def _product_of_experts(
        self, x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, per_row: int
    ) -> Tensor:
        """x [pairs / per_row, in], weight [experts, out, in] -> [pairs, out]; ``order`` [pairs] are
        the pairs by expert, ``starts`` [experts + 1] where each expert begins in it."""
        x = x if x.stride(-1) == 1 else x.contiguous()
        weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        num_experts, num_outputs, num_inputs = weight.shape
        pairs = len(order)
        rows = 16 if pairs <= 32 * num_experts else 64
        columns = 64
        out = torch.empty(pairs, num_outputs, dtype=x.dtype, device=x.device)
        self.launch(
            self._experts.experts_kernel,
            (pairs // rows + num_experts, -(-num_outputs // columns)),
            (
                *(out, x, weight, order, starts, num_experts, num_outputs, num_inputs),
                *(x.stride(0), *weight.stride()[:2]),
            ),
            {
                "PER_ROW": per_row,
                "ROWS": rows,
                "COLUMNS": columns,
                "DEPTH": 32 if x.dtype == torch.float32 else 64,
                "UPCAST": x.dtype == torch.float32 or self._interpreted,
            },
            num_warps=self._tiling.experts_warps,
            num_stages=3,
        )
        return out

    # -- attention ------------------------------------------------------------------------------

    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        num_kv_heads, block_size, head_size = key_cache.shape[1:]
        if len(k):
            self.launch(
                self._elementwise.write_kv_kernel,
                (len(k),),
                (
                    *(k, v, key_cache, value_cache, slot_mapping),
                    *(*k.stride()[:2], *v.stride()[:2], *key_cache.stride()[:3]),
                    *(block_size, num_kv_heads, head_size),
                ),
                {"HEADS": self._power(num_kv_heads), "SIZE": self._power(head_size)},
                num_warps=self._tiling.token_warps,
            )

    def rotary_write_kv(
        self,
        positions: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        interleaved: bool,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """Rotates q in place; k is rotated on its way to the cache, and its tensor is unchanged."""
        num_kv_heads, block_size, head_size = key_cache.shape[1:]
        half = cos_sin.shape[1] // 2
        if len(q):
            self.launch(
                self._elementwise.rotary_write_kv_kernel,
                (len(q),),
                (
                    *(positions, q, k, v, cos_sin, key_cache, value_cache, slot_mapping),
                    *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *key_cache.stride()[:3]),
                    *(block_size, q.shape[1], num_kv_heads, head_size, half),
                ),
                {
                    "HEADS": self._power(q.shape[1]),
                    "KV_HEADS": self._power(num_kv_heads),
                    "HALF": self._power(half),
                    "SIZE": self._power(head_size),
                    "INTERLEAVED": interleaved,
                },
                num_warps=self._tiling.token_warps,
            )
        return q

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        tokens, heads, head_size = q.shape
        num_kv_heads, block_size = key_cache.shape[1:3]
        num_seqs = len(seq_lens)
        if head_size > LARGEST_HEAD:
            raise ConfigError(
                f"ops.paged_attention=triton has head sizes up to {LARGEST_HEAD}, not {head_size}; "
                "choose ops.paged_attention=torch",
                key="ops.paged_attention",
            )
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        if not tokens or not num_seqs:
            return out
        group = heads // num_kv_heads
        rows = -(-tokens // num_seqs) * group
        tile = self._tiling.tile(head_size, group, rows, q.itemsize)
        blocks = tokens // (tile.rows // group) + num_seqs
        at_work = min(blocks, tokens) * num_kv_heads  # the rest find nothing to do
        splits = self._splits(at_work, block_table.shape[1] * block_size)
        partial = stats = out
        if splits > 1:
            shape = (tokens, heads, splits, head_size)
            partial = torch.empty(shape, dtype=torch.float32, device=q.device)
            stats = torch.empty((*shape[:3], 2), dtype=torch.float32, device=q.device)
        size = max(16, self._power(head_size))  # the least that a product of tiles takes
        sizes = {"HEAD_SIZE": head_size, "SIZE": size, "SPLITS": splits}
        self.launch(
            self._attention.attention_kernel,
            (blocks, num_kv_heads, splits),
            (
                *(out, partial, stats, q, key_cache, value_cache),
                *(query_start, seq_lens, block_table),
                *(scale, soft_cap or 0.0, window or 0, num_seqs, heads, *q.stride()[:2]),
                *(*key_cache.stride()[:3], *value_cache.stride()[:3], block_table.stride(0)),
            ),
            {
                **sizes,
                "GROUP": group,
                "PAGE": block_size,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "WINDOW": window is not None,
                "SOFT_CAP": soft_cap is not None,
                "UPCAST": q.dtype == torch.float32 or self._interpreted,
            },
            num_warps=tile.num_warps,
            num_stages=self._num_stages or self._tiling.num_stages,
        )
        if splits > 1:
            self.launch(
                self._attention.merge_kernel,
                (tokens, heads),
                (out, partial, stats, query_start, num_seqs),
                sizes,
                num_warps=self._tiling.token_warps,
            )
        return out

    def _splits(self, programs: int, context: int) -> int:
        """Number of splits of the contexts, so that the device is full: a power of two."""
        wanted = min(-(-self._wanted_programs // programs), context // LEAST_SPLIT, MOST_SPLITS)
        return self._power(max(1, wanted))

    @cached_property
    def architecture(self) -> str:
        """Target of the device: ``sm_90``, ``gfx942``. Set to another one to compile for it."""
        return self._architecture_of_device()

    @cached_property
    def _tiling(self) -> Any:
        row, tiling = self._tiling_of(self.architecture)
        if row != self.architecture:
            log.info("no tiles for %s; its kernels take those of %s", self.architecture, row)
        return tiling

    @cached_property
    def _wanted_programs(self) -> int:
        return self._programs or 4 * self._num_multiprocessors()

    # -- sampling -------------------------------------------------------------------------------

    def greedy_sample(self, logits: Tensor) -> Tensor:
        rows, vocab = logits.shape
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
        if rows:
            self.launch(
                self._sampling.greedy_kernel,
                (rows,),
                (out, logits, logits.stride(0), vocab),
                {"BLOCK": min(8192, self._power(vocab))},
                num_warps=8,
            )
        return out

    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        rows, vocab = logits.shape
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
        if rows:
            self.launch(
                self._sampling.top_k_top_p_kernel,
                (rows,),
                (out, logits, top_k, top_p, min_p, uniform, logits.stride(0), vocab),
                {"BLOCK": min(4096, self._power(vocab))},  # twice that spills registers on sm_*
                num_warps=16,
            )
        return out


def _warps(elements: int) -> int:
    """Warps for a program of so many elements: about eight for each thread."""
    return min(16, 1 << round(math.log2(max(elements, 256) / 256)))
