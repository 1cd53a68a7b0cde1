"""Our C++ kernels for the host, called through ctypes on plain pointers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from vllm_di.cache import is_whole
from vllm_di.components.interfaces import Device, OpLibrary, Recorder, Replay
from vllm_di.components.ops.cpu_candidates import candidates
from vllm_di.components.ops.cpu_isa import select_isa
from vllm_di.components.ops.cpu_packing import TYPES, PackedBytes, PackedWeight
from vllm_di.components.ops.cpu_paths import Measured, kept, measured, place
from vllm_di.components.ops.cpu_products import PRODUCTS, TILED, Allocate, CpuProducts, are_rows
from vllm_di.components.ops.torch import TorchOps
from vllm_di.errors import ConfigError
from vllm_di.kernels.bindings import CpuKernels
from vllm_di.kernels.build import (
    BuildError,
    Built,
    build,
    default_cache,
    loaded_openmp,
    recipe,
)
from vllm_di.kernels.build import prebuilt as find_prebuilt
from vllm_di.kernels.isa import AMX, EMULATED
from vllm_di.kernels.memory import Pool
from vllm_di.kernels.tape import record

SMALL_BATCH = 8
UNBUILT = "will be compiled at the first start"


class CpuOps(CpuProducts):
    """Compiled on first use for this machine's instruction set. fp32 and bf16; what a kernel cannot
    take (fp16, mixed dtypes, odd strides) runs on the reference.

    ``compile=require`` makes a failed build an error; ``auto`` then implements nothing and says
    why. Kernels run on as many threads as torch had when this was built.
    """

    reuses = frozenset({"record"})

    def __init__(
        self,
        device: Device,
        *,
        isa: Literal[
            "auto",
            "amx",
            "amx_emulated",
            "avx512_bf16",
            "avx512",
            "avx2",
            "neon_bf16",
            "neon",
            "generic",
        ],
        compile: Literal["auto", "require"],
        cache: str | None,
        prebuilt: str | None = None,
        rows_for_onednn: Annotated[int, msgspec.Meta(ge=1)] | None,
        rows_for_tiles: Annotated[int, msgspec.Meta(ge=1)] | None = None,
    ) -> None:
        shipped = Path(prebuilt).expanduser() if prebuilt else None
        choice = select_isa(isa, shipped)
        if device.torch_device != torch.device("cpu"):  # kernels take addresses of host memory
            raise ConfigError(f"ops=cpu runs on the host, not on {device.torch_device}")
        self.isa = choice.isa
        self._rows_for_onednn = rows_for_onednn
        least = 1 if rows_for_tiles is None and isa == EMULATED else rows_for_tiles
        self._rows_for_tiles: dict[str, int | None] = dict.fromkeys(TILED, least)
        self._measured: Measured | None = None
        self._reference = TorchOps()
        self.threads = torch.get_num_threads()
        self.has_tiles = False
        self._empty: Allocate = _empty
        self._ready: dict[int, list[Tensor]] = {}
        """Rows to outputs that nobody has had."""
        try:
            folder = Path(cache).expanduser() if cache else default_cache()
            ready = find_prebuilt(self.isa, shipped) if shipped else None
            built = ready or self._build(folder)
        except BuildError as error:
            if compile == "require":
                raise ConfigError(
                    f"compile=require: the kernels cannot be built: {error}"
                ) from None
            self.implements = frozenset()
            self._where = str(error)
            return
        note = UNBUILT if built is None else built.note
        passed_over = [f"no {better}: {why}" for better, why in choice.passed_over.items()]
        parts = (self.isa, *passed_over, "fp16: torch", note)
        self._where = f"cpu ({'; '.join(filter(None, parts))})"
        if built is not None:
            self._bind(built)
        if least is None and built is not None:
            self._measured = self._measure(place(folder, Path(built.library._name).name))
            if self._measured is not None:
                self._rows_for_tiles = {kind: self._measured.rows_for_tiles(kind) for kind in TILED}

    @classmethod
    def preview(cls, **arguments: Any) -> OpLibrary:
        """Compiles nothing. A subclass is built in the usual way."""
        return CpuOpsPreview(**arguments) if cls is CpuOps else cls(**arguments)

    def _build(self, cache: Path) -> Built | None:
        return build(self.isa, cache, loaded_openmp())

    def _measure(self, path: Path) -> Measured | None:
        return measured(path, lambda: candidates(self), self.threads)

    def _bind(self, built: Built) -> None:
        kernels = CpuKernels(built.library)
        self._rms_norm = kernels.rms_norm
        self._add_rms_norm = kernels.add_rms_norm
        self._rotary = kernels.rotary_embedding
        self._gate = kernels.gate_and_mul
        self._write = kernels.write_kv
        self._rotary_write = kernels.rotary_write_kv
        self._attend = kernels.paged_attention
        self._argmax = kernels.argmax
        self._draw = kernels.top_k_top_p_sample
        self._embed = kernels.embedding
        self._packed_rows = kernels.packed_rows
        self._group_rows = kernels.group_rows
        self.has_tiles = bool(kernels.has_tiles())
        self.kernels = kernels

    def describe(self) -> dict[str, str]:
        """Op to where it runs, or to the reason why it has no kernel here; for products, also to
        what was measured of the ways to multiply."""
        missing = "no C++ kernel" if self.implements else self._where
        rows = {op: self._where if op in self.implements else missing for op in self.OPS}
        for op, dtypes in PRODUCTS.items() if self.implements else ():
            rows[op] = "; ".join([rows[op], *self.paths(dtypes)])
        if self._prompts_by_tiles:
            rows["paged_attention"] += "; prompts in bf16 by tiles"
        return rows

    @property
    def _prompts_by_tiles(self) -> bool:
        """Whether attention multiplies prompts in bf16 by tile registers: where GEMMs of many rows
        are faster so."""
        return self.has_tiles and self._rows_for_tiles["bf16"] is not None

    # -- norms, rotary, gates -------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kind, strides, shape = TYPES.get(x.dtype), x.stride(), x.shape
        if kind is None or weight.dtype is not x.dtype or strides[-1] != 1 or len(shape) > 3:
            return self._reference.rms_norm(x, weight, eps)
        if len(shape) == 3:  # heads within tokens
            rows, inner, size = shape
            stride, inner_stride = strides[0], strides[1]
        elif len(shape) == 2:
            (rows, size), stride, inner, inner_stride = shape, strides[0], 1, 0
        else:
            rows, size, stride, inner, inner_stride = 1, shape[0], 0, 1, 0
        out = self._empty(shape, x.dtype)
        self._rms_norm(
            kind,
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            inner,
            stride,
            inner_stride,
            size,
            eps,
            self.threads,
        )
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The sum is written to the memory of ``residual``."""
        kind = TYPES.get(x.dtype)
        if (
            kind is None
            or not (x.dtype is residual.dtype is weight.dtype)
            or not (x.is_contiguous() and residual.is_contiguous())
        ):
            return self._reference.add_rms_norm(x, residual, weight, eps)
        out = self._empty(x.shape, x.dtype)
        size = x.shape[-1]
        self._add_rms_norm(
            kind,
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // size if size else 0,
            size,
            eps,
            self.threads,
        )
        return out, residual

    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        """In place."""
        kind = TYPES.get(q.dtype)
        if (
            kind is None
            or q.dtype is not k.dtype
            or not (_heads_side_by_side(q) and _heads_side_by_side(k))
            or cos_sin.dtype is not torch.float32
            or not cos_sin.is_contiguous()
        ):
            return self._reference.rotary_embedding(positions, q, k, cos_sin, interleaved)
        tokens, heads, size = q.shape
        self._rotary(
            kind,
            positions.data_ptr(),
            q.data_ptr(),
            k.data_ptr(),
            cos_sin.data_ptr(),
            tokens,
            heads,
            k.shape[1],
            q.stride()[0],
            k.stride()[0],
            size,
            cos_sin.shape[1] // 2,
            interleaved,
            self.threads,
        )
        return q, k

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return self._gated(x, 0) if are_rows(x) else self._reference.silu_and_mul(x)

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        return self._gated(x, 1) if are_rows(x) else self._reference.gelu_tanh_and_mul(x)

    def _gated(self, x: Tensor, gelu: int) -> Tensor:
        rows, size = x.shape
        size //= 2
        out = self._empty((rows, size), x.dtype)
        self._gate(
            TYPES[x.dtype],
            gelu,
            x.data_ptr(),
            out.data_ptr(),
            rows,
            size,
            x.stride()[0],
            self.threads,
        )
        return out

    # -- GEMMs ----------------------------------------------------------------------------------

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        if not weight.is_contiguous():
            return self._reference.embedding(token_ids, weight)
        out = self._empty((len(token_ids), weight.shape[1]), weight.dtype)
        self._embed(
            token_ids.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            len(token_ids),
            weight.shape[1] * weight.element_size(),
            self.threads,
        )
        return out

    def packed_embedding(
        self, weight: Any, dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor] | None:
        """All formats, except scales by channel."""
        if isinstance(weight, PackedWeight) and weight.dtype is dtype and not weight.gated:
            return partial(self._embed_packed, weight)
        if isinstance(weight, PackedBytes) and weight.bits and dtype in TYPES and not weight.gated:
            return partial(self._embed_groups, weight, dtype)
        return None

    def _embed_packed(self, weight: PackedWeight, token_ids: Tensor) -> Tensor:
        out = self._empty((len(token_ids), weight.inputs), weight.dtype)
        self._packed_rows(
            token_ids.data_ptr(),
            weight.data.data_ptr(),
            out.data_ptr(),
            len(token_ids),
            weight.inputs * out.element_size() // 4,
            self.threads,
        )
        return out

    def _embed_groups(self, weight: PackedBytes, dtype: torch.dtype, token_ids: Tensor) -> Tensor:
        out = self._empty((len(token_ids), weight.inputs), dtype)
        self._group_rows(
            TYPES[dtype],
            weight.bits,
            token_ids.data_ptr(),
            weight.data.data_ptr(),
            out.data_ptr(),
            len(token_ids),
            weight.inputs,
            self.threads,
        )
        return out

    # -- cache and attention --------------------------------------------------------------------

    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if not (
            k.dtype is v.dtype is key_cache.dtype is value_cache.dtype
            and _heads_side_by_side(k)
            and _heads_side_by_side(v)
            and key_cache.is_contiguous()
            and value_cache.is_contiguous()
        ):
            self._reference.write_kv(k, v, key_cache, value_cache, slot_mapping)
            return
        tokens, heads, size = k.shape
        self._write(
            k.element_size(),
            k.data_ptr(),
            v.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slot_mapping.data_ptr(),
            tokens,
            heads,
            size,
            key_cache.shape[2],
            k.stride()[0],
            v.stride()[0],
            self.threads,
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
        """q in place; k stays as it is."""
        kind = TYPES.get(q.dtype)
        if (
            kind is None
            or not (q.dtype is k.dtype is v.dtype is key_cache.dtype is value_cache.dtype)
            or not all(map(_heads_side_by_side, (q, k, v)))
            or not (key_cache.is_contiguous() and value_cache.is_contiguous())
            or cos_sin.dtype is not torch.float32
            or not cos_sin.is_contiguous()
        ):
            return super().rotary_write_kv(
                positions, q, k, v, cos_sin, interleaved, key_cache, value_cache, slot_mapping
            )
        tokens, heads, size = q.shape
        self._rotary_write(
            kind,
            positions.data_ptr(),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos_sin.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slot_mapping.data_ptr(),
            tokens,
            heads,
            k.shape[1],
            q.stride()[0],
            k.stride()[0],
            v.stride()[0],
            size,
            cos_sin.shape[1] // 2,
            key_cache.shape[2],
            interleaved,
            self.threads,
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
        kind = TYPES.get(q.dtype)
        if not (
            kind is not None
            and q.dtype is key_cache.dtype is value_cache.dtype
            and _heads_side_by_side(q)
            and key_cache.is_contiguous()
            and value_cache.is_contiguous()
        ):
            return self._reference.paged_attention(
                q,
                key_cache,
                value_cache,
                query_start,
                seq_lens,
                block_table,
                scale,
                window,
                soft_cap,
            )
        if block_table.stride()[1] != 1:
            block_table = block_table.contiguous()
        out = self._empty(q.shape, q.dtype)
        tokens, heads, size = q.shape
        _, kv_heads, block_size, _ = key_cache.shape
        self._attend(
            kind,
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out.data_ptr(),
            query_start.data_ptr(),
            seq_lens.data_ptr(),
            block_table.data_ptr(),
            tokens,
            seq_lens.shape[0],
            heads,
            kv_heads,
            size,
            block_size,
            block_table.stride()[0],
            q.stride()[0],
            scale,
            soft_cap or 0.0,
            window or 0,
            self._prompts_by_tiles,
            self.threads,
        )
        return out

    # -- sampling -------------------------------------------------------------------------------

    def greedy_sample(self, logits: Tensor) -> Tensor:
        if logits.dtype is not torch.float32 or logits.stride()[1] != 1:
            return self._reference.greedy_sample(logits)
        rows, vocab = logits.shape
        out = self._numbers(rows)
        self._argmax(
            logits.data_ptr(), out.data_ptr(), rows, vocab, logits.stride()[0], self.threads
        )
        return out

    def _numbers(self, rows: int) -> Tensor:
        """[rows] int64. Small ones are made many at a time: after a model step torch code has left
        the CPU caches, and a single call takes 50 us."""
        if not 0 < rows <= SMALL_BATCH or self._empty is not _empty:
            return self._empty((rows,), torch.int64)
        if not self._ready.get(rows):
            self._ready[rows] = list(_empty((64, rows), torch.int64).unbind())
        return self._ready[rows].pop()

    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        if logits.dtype is not torch.float32 or logits.stride()[1] != 1:
            return self._reference.top_k_top_p_sample(logits, top_k, top_p, min_p, uniform)
        rows, vocab = logits.shape
        out = self._empty((rows,), torch.int64)
        self._draw(
            logits.data_ptr(),
            top_k.data_ptr(),
            top_p.data_ptr(),
            min_p.data_ptr(),
            uniform.data_ptr(),
            out.data_ptr(),
            rows,
            vocab,
            logits.stride()[0],
            self.threads,
        )
        return out

    # -- recording ------------------------------------------------------------------------------

    def recorder(self) -> Recorder | None:
        return CpuRecorder(self) if self.implements else None

    def allocating(self, empty: Allocate) -> Allocate:
        """Take outputs from ``empty`` from now on; returns the allocator used before."""
        before, self._empty = self._empty, empty
        return before


class CpuRecorder(Recorder):
    """Records on one library; outputs that are recorded lie in a pool."""

    def __init__(self, ops: CpuOps) -> None:
        self._ops, self._pool = ops, Pool()

    def record(self, step: Callable[[], Tensor]) -> tuple[Tensor, Replay | None, str]:
        before = self._ops.allocating(self._pool.empty)
        try:
            return record(self._ops.kernels, step, self._ops.threads, self._pool)
        finally:
            self._ops.allocating(before)


class CpuOpsPreview(CpuOps):
    """A preview of CpuOps: it describes itself, computes nothing, compiles and measures nothing."""

    def _build(self, cache: Path) -> Built | None:
        is_there = is_whole(recipe(self.isa, cache, loaded_openmp()).target)
        return super()._build(cache) if is_there else None

    def _bind(self, built: Built) -> None:
        """Nothing is going to be called."""
        self.has_tiles = self.isa in (AMX, EMULATED)

    def _measure(self, path: Path) -> Measured | None:
        return kept(path)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _heads_side_by_side(x: Tensor) -> bool:
    """Whether x is [tokens, heads, head_size] with contiguous heads."""
    _, heads, size = x.shape
    _, stride, step = x.stride()
    return step == 1 and (stride == size or heads == 1)
