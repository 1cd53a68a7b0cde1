"""Our C++ kernels for the host, called through ctypes on plain pointers."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_di.components.interfaces import Device, OpLibrary
from vllm_di.components.ops.torch import TorchOps
from vllm_di.errors import ConfigError
from vllm_di.kernels.build import BuildError, build, usable_isas

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels compute in; fp16 goes to the reference."""
LANES = 16
OPS = frozenset(
    {
        "rms_norm",
        "add_rms_norm",
        "rotary_embedding",
        "silu_and_mul",
        "gelu_tanh_and_mul",
        "linear",
        "write_kv",
        "paged_attention",
        "greedy_sample",
        "top_k_top_p_sample",
    }
)
PTR, INT, LONG, REAL = c_void_p, c_int, c_int64, c_float
SIGNATURES: dict[str, list[Any]] = {
    "rms_norm": [INT, PTR, PTR, PTR, LONG, LONG, LONG, LONG, LONG, REAL, INT],
    "add_rms_norm": [INT, PTR, PTR, PTR, PTR, LONG, LONG, REAL, INT],
    "rotary_embedding": [
        INT,
        PTR,
        PTR,
        PTR,
        PTR,
        LONG,
        LONG,
        LONG,
        LONG,
        LONG,
        LONG,
        LONG,
        INT,
        INT,
    ],
    "gate_and_mul": [INT, INT, PTR, PTR, LONG, LONG, LONG, INT],
    "write_kv": [LONG, PTR, PTR, PTR, PTR, PTR, LONG, LONG, LONG, LONG, LONG, LONG],
    "argmax": [PTR, PTR, LONG, LONG, LONG, INT],
    "linear": [INT, PTR, PTR, PTR, PTR, LONG, LONG, LONG, LONG, INT, INT],
    "paged_attention": [
        INT,
        PTR,
        PTR,
        PTR,
        PTR,
        PTR,
        PTR,
        PTR,
        LONG,
        LONG,
        LONG,
        LONG,
        LONG,
        LONG,
        LONG,
        REAL,
        REAL,
        LONG,
        INT,
    ],
    "top_k_top_p_sample": [PTR, PTR, PTR, PTR, PTR, PTR, LONG, LONG, LONG, INT],
}


class PackedWeight:
    """A weight in panels of 16 outputs, and the plain one where many rows go through oneDNN."""

    __slots__ = ("data", "inputs", "outputs", "plain")

    def __init__(self, weight: Tensor, keep_plain: bool) -> None:
        self.outputs, self.inputs = weight.shape
        self.data = _pack(weight)
        self.plain = weight if keep_plain else None


class CpuOps(OpLibrary):
    """Compiled on first use for this machine's instruction set. fp32 and bf16; others run on the
    reference.

    ``compile=require`` makes a failed build an error; ``auto`` then implements nothing and says
    why.
    """

    def __init__(
        self,
        device: Device,
        *,
        isa: Literal["auto", "avx512_bf16", "avx512", "avx2", "generic"],
        compile: Literal["auto", "require"],
        cache: str | None,
        rows_for_onednn: Annotated[int, msgspec.Meta(ge=1)] | None,
    ) -> None:
        usable = usable_isas()
        if isa != "auto" and isa not in usable:
            raise ConfigError(f"isa={isa}: this CPU does not have it; it has {', '.join(usable)}")
        if device.torch_device.type != "cpu":
            raise ConfigError(f"ops=cpu runs on the host, not on {device.torch_device}")
        self.isa = usable[0] if isa == "auto" else isa
        self._rows_for_onednn = rows_for_onednn
        self._reference = TorchOps()
        self._threads = torch.get_num_threads()
        self._reason = ""
        folder = Path(cache).expanduser() if cache else default_cache()
        try:
            library = build(self.isa, folder, _openmp())
        except BuildError as error:
            if compile == "require":
                raise ConfigError(f"the kernels cannot be built: {error}") from None
            self.implements = frozenset()
            self._reason = str(error)
            return
        self.implements = OPS
        self._calls: dict[str, Callable[..., None]] = {}
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
            self._calls[name] = function
        self._linear = self._calls["linear"]
        self._rms_norm = self._calls["rms_norm"]
        self._add_rms_norm = self._calls["add_rms_norm"]
        self._rotary = self._calls["rotary_embedding"]
        self._gate = self._calls["gate_and_mul"]
        self._write = self._calls["write_kv"]
        self._attend = self._calls["paged_attention"]

    def describe(self) -> dict[str, str]:
        if self._reason:
            return dict.fromkeys(self.OPS, self._reason)
        return dict.fromkeys(OPS, f"cpu ({self.isa})")

    # -- norms, rotary, gates -------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kind = TYPES.get(x.dtype)
        if kind is None or x.dim() not in (2, 3) or x.stride(-1) != 1:
            return self._reference.rms_norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype)
        inner, inner_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
        self._rms_norm(
            kind,
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            inner,
            x.stride(0),
            inner_stride,
            x.shape[-1],
            eps,
            self._threads,
        )
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        kind = TYPES.get(x.dtype)
        if kind is None or not (x.is_contiguous() and residual.is_contiguous()):
            return self._reference.add_rms_norm(x, residual, weight, eps)
        out = torch.empty_like(x)
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
            self._threads,
        )
        return out, residual

    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        kind = TYPES.get(q.dtype)
        size = q.shape[-1]
        if kind is None or not (_heads_side_by_side(q) and _heads_side_by_side(k)):
            return self._reference.rotary_embedding(positions, q, k, cos_sin, interleaved)
        self._rotary(
            kind,
            positions.data_ptr(),
            q.data_ptr(),
            k.data_ptr(),
            cos_sin.data_ptr(),
            q.shape[0],
            q.shape[1],
            k.shape[1],
            q.stride(0),
            k.stride(0),
            size,
            cos_sin.shape[-1] // 2,
            int(interleaved),
            self._threads,
        )
        return q, k

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return self._gated(x, 0)

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        return self._gated(x, 1)

    def _gated(self, x: Tensor, gelu: int) -> Tensor:
        kind = TYPES.get(x.dtype)
        if kind is None or x.dim() != 2 or x.stride(-1) != 1:
            reference = self._reference
            return reference.gelu_tanh_and_mul(x) if gelu else reference.silu_and_mul(x)
        rows, size = x.shape[0], x.shape[1] // 2
        out = torch.empty(rows, size, dtype=x.dtype)
        self._gate(kind, gelu, x.data_ptr(), out.data_ptr(), rows, size, x.stride(0), self._threads)
        return out

    # -- products -------------------------------------------------------------------------------

    def pack_linear(self, weight: Tensor) -> Any:
        if weight.dtype not in TYPES or weight.shape[1] % 2:
            return weight
        return PackedWeight(weight, keep_plain=self._rows_for_onednn is not None)

    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if not isinstance(weight, PackedWeight):
            return self._reference.linear(x, weight, bias, out_dtype)
        rows = x.shape[0]
        if (
            weight.plain is not None
            and self._rows_for_onednn is not None
            and rows >= self._rows_for_onednn
            and out_dtype is None
        ):
            return F.linear(x, weight.plain, bias)
        if x.stride(-1) != 1 or x.stride(0) % 2:
            x = x.contiguous()
        out = torch.empty(rows, weight.outputs, dtype=out_dtype or x.dtype)
        wide = bias.float() if bias is not None else None
        self._linear(
            TYPES[x.dtype],
            x.data_ptr(),
            weight.data.data_ptr(),
            None if wide is None else wide.data_ptr(),
            out.data_ptr(),
            rows,
            weight.outputs,
            weight.inputs,
            x.stride(0),
            TYPES[out.dtype],
            self._threads,
        )
        return out

    # -- cache and attention --------------------------------------------------------------------

    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        plain = k.dtype == key_cache.dtype and _heads_side_by_side(k) and _heads_side_by_side(v)
        if not plain:
            self._reference.write_kv(k, v, key_cache, value_cache, slot_mapping)
            return
        self._write(
            k.element_size(),
            k.data_ptr(),
            v.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slot_mapping.data_ptr(),
            k.shape[0],
            k.shape[1],
            k.shape[2],
            key_cache.shape[2],
            k.stride(0),
            v.stride(0),
        )

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
        if kind is None or key_cache.dtype != q.dtype or not _heads_side_by_side(q):
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
        # rows beyond the last query are padding: their output is never read, but must be finite
        out = torch.zeros(q.shape, dtype=q.dtype)
        self._attend(
            kind,
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out.data_ptr(),
            query_start.data_ptr(),
            seq_lens.data_ptr(),
            block_table.data_ptr(),
            seq_lens.shape[0],
            q.shape[1],
            key_cache.shape[1],
            q.shape[2],
            key_cache.shape[2],
            block_table.stride(0),
            q.stride(0),
            scale,
            soft_cap or 0.0,
            window or 0,
            self._threads,
        )
        return out

    # -- sampling -------------------------------------------------------------------------------

    def greedy_sample(self, logits: Tensor) -> Tensor:
        if logits.dtype != torch.float32 or logits.stride(-1) != 1:
            return self._reference.greedy_sample(logits)
        out = torch.empty(logits.shape[0], dtype=torch.int64)
        self._calls["argmax"](
            logits.data_ptr(),
            out.data_ptr(),
            logits.shape[0],
            logits.shape[1],
            logits.stride(0),
            self._threads,
        )
        return out

    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        if logits.dtype != torch.float32 or logits.stride(-1) != 1:
            return self._reference.top_k_top_p_sample(logits, top_k, top_p, min_p, uniform)
        out = torch.empty(logits.shape[0], dtype=torch.int64)
        self._calls["top_k_top_p_sample"](
            logits.data_ptr(),
            top_k.data_ptr(),
            top_p.data_ptr(),
            min_p.data_ptr(),
            uniform.data_ptr(),
            out.data_ptr(),
            logits.shape[0],
            logits.shape[1],
            logits.stride(0),
            self._threads,
        )
        return out

    # the reference's: not in ``implements``, named here for the interface
    embedding = TorchOps.embedding
    fused_experts = TorchOps.fused_experts


def default_cache() -> Path:
    """``kernels`` in the user's cache folder."""
    from vllm_di.models.checkpoint import user_cache

    return user_cache() / "kernels"


def _openmp() -> Path | None:
    """The OpenMP runtime that torch brought and loaded."""
    return next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)


def _heads_side_by_side(x: Tensor) -> bool:
    """[tokens, heads, head_size] whose heads lie one behind the other."""
    return x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])


def _pack(weight: Tensor) -> Tensor:
    """[out, in] -> [panels, in, 16] in fp32, [panels, in / 2, 16, 2] in bf16; missing outputs are
    zero."""
    missing = -weight.shape[0] % LANES
    if missing:
        weight = F.pad(weight, (0, 0, 0, missing))
    panels = weight.unflatten(0, (-1, LANES))  # [panels, 16, in]
    if weight.dtype == torch.float32:
        return panels.transpose(1, 2).contiguous()
    return panels.unflatten(2, (-1, 2)).transpose(1, 2).contiguous()
