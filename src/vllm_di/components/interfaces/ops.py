"""For whoever brings kernels: the ops that models, attention and samplers call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vllm_di.components.quantized import QuantizedWeight

Activation = Literal["silu", "gelu_tanh"]
"""Of a gated MLP."""


class OpTable(ABC):
    """(7) The named ops that models, attention and samplers call. ``ops/torch.py`` is the reference
    for each.

    Inputs may be views with stride 1 in the last dimension. Outputs are new tensors unless the text
    says otherwise. Weights given to ``linear`` have been through ``pack_linear`` of the same
    library, once, after loading.
    """

    OPS: ClassVar[tuple[str, ...]] = (
        "rms_norm",
        "add_rms_norm",
        "rotary_embedding",
        "silu_and_mul",
        "gelu_tanh_and_mul",
        "linear",
        "quantized_linear",
        "gated_linear",
        "gated_quantized_linear",
        "embedding",
        "fused_experts",
        "write_kv",
        "paged_attention",
        "greedy_sample",
        "top_k_top_p_sample",
        "rotary_write_kv",
    )
    FUSED: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "add_rms_norm": ("rms_norm",),
        "gated_linear": ("linear", "silu_and_mul", "gelu_tanh_and_mul"),
        "gated_quantized_linear": ("quantized_linear", "silu_and_mul", "gelu_tanh_and_mul"),
        "rotary_write_kv": ("rotary_embedding", "write_kv"),
    }
    """Fused op to the ops that it stands for: it runs only where all of them come from its own
    library."""
    fusions: Sequence[str] = ()
    """Fused ops in force."""
    opaque: Mapping[str, str] = {}
    """Op to its library, for ops that a compiled program cannot take in: they are no torch code."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., hidden], weight [hidden]: x / sqrt(mean(x^2) + eps) * weight, reduced in fp32."""

    @abstractmethod
    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(s), s) with s = x + residual; may reuse the memory of ``x`` and
        ``residual``."""

    @abstractmethod
    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        """q [tokens, heads, head_size], k [tokens, kv_heads, head_size], cos_sin [positions,
        rotary_dim] fp32 (cosines, then sines). Rotates the first rotary_dim elements of each head;
        may work in place. ``interleaved`` pairs (2i, 2i + 1), otherwise (i, i + rotary_dim / 2)."""

    @abstractmethod
    def silu_and_mul(self, x: Tensor) -> Tensor:
        """x [..., 2 d] -> silu(x[..., :d]) * x[..., d:]."""

    @abstractmethod
    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        """x [..., 2 d] -> gelu_tanh(x[..., :d]) * x[..., d:]."""

    def pack_linear(self, weight: Tensor) -> Any:
        """Weight [out, in] to whatever ``linear`` of this library likes best. The original may then
        be dropped."""
        return weight

    @abstractmethod
    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [tokens, in], weight from ``pack_linear`` -> [tokens, out] in ``out_dtype`` (x's by
        default). Logits ask for fp32: rounded to bf16, likely tokens would tie."""

    def pack_quantized(self, weight: QuantizedWeight) -> Any:
        """As pack_linear, for ``quantized_linear``."""
        return weight

    @abstractmethod
    def quantized_linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As linear, on a weight from ``pack_quantized``. May round x to signed bytes on the way:
        by row or, for weights by group, by 32 inputs, with scale max |x| / 127."""

    def pack_gated_linear(self, weight: Tensor) -> Any:
        """As pack_linear, for ``gated_linear``."""
        return self.pack_linear(weight)

    @abstractmethod
    def gated_linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        """x [tokens, in], weight [2 d, in] from ``pack_gated_linear`` -> act(y[..., :d]) * y[...,
        d:] of y = linear(x, weight, bias), in x's dtype; y itself need not be rounded to it."""

    def pack_gated_quantized(self, weight: QuantizedWeight) -> Any:
        """As pack_quantized, for ``gated_quantized_linear``."""
        return self.pack_quantized(weight)

    @abstractmethod
    def gated_quantized_linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        """As gated_linear, on a weight from ``pack_gated_quantized``."""

    @abstractmethod
    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """token_ids [tokens] int64, weight [vocab, hidden] -> [tokens, hidden]."""

    def packed_embedding(
        self, weight: Any, dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor] | None:
        """For a ``weight`` [vocab, hidden] from ``pack_linear`` or ``pack_quantized``: token_ids
        [tokens] int64 -> [tokens, hidden] in ``dtype``, what ``embedding`` gives of the plain
        table. None where this library cannot read such a weight: then the table is kept."""
        return None

    @abstractmethod
    def fused_experts(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Activation,
    ) -> Tensor:
        """x [tokens, hidden], gate_up [experts, 2 inter, hidden], down [experts, hidden, inter],
        topk_* [tokens, k] -> sum over k of weight * down(act(gate) * up)."""

    @abstractmethod
    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """k, v [tokens, kv_heads, head_size]; caches [blocks, kv_heads, block_size, head_size],
        written in place. Token i goes to slot s = slot_mapping[i] (int64): block s // block_size,
        offset s % block_size. s < 0: dropped."""

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
        """q and k as in ``rotary_embedding``, the rest as in ``write_kv``: rotates q and k, writes
        k and v. -> q [tokens, heads, head_size]; may rotate q and k in place. A library without
        its own has this one, of its two ops."""
        q, k = self.rotary_embedding(positions, q, k, cos_sin, interleaved)
        self.write_kv(k, v, key_cache, value_cache, slot_mapping)
        return q

    @abstractmethod
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
        """Causal attention of q [tokens, heads, head_size] over block tables. Sequence s owns query
        rows query_start[s]:query_start[s + 1] (int32), which are the last of its seq_lens[s]
        (int32) cached tokens; block_table [seqs, max_blocks] int32. ``window``: a query sees that
        many tokens, itself included. ``soft_cap`` c: scores become c * tanh(scores / c). ->
        [tokens, heads, head_size]. Reads no slot beyond seq_lens (they may hold NaN)."""

    @abstractmethod
    def greedy_sample(self, logits: Tensor) -> Tensor:
        """logits [rows, vocab] fp32 -> argmax [rows] int64, the lowest id on a tie; -1 for a row
        whose largest entry is not finite, or that holds a NaN."""

    @abstractmethod
    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        """logits [rows, vocab] fp32, already scaled by temperature; top_k [rows] int64 (vocab =
        off), top_p, min_p and uniform [rows] fp32. Keeps the top k (ties at the threshold stay), of
        these the smallest set whose mass reaches top_p (at least one), of these those with p >=
        min_p * p_max; then inverts the renormalised cumulative mass, in order of falling
        probability (id on a tie), at ``uniform`` in [0, 1). -> [rows] int64."""

    def describe(self) -> dict[str, str]:
        """Op to where it runs, for ``explain``: ``cpu (avx512_bf16)``, ``torch (no compiler:
        ...)``."""
        return {name: type(self).__name__ for name in self.OPS}

    def library_of(self, op: str) -> OpLibrary | None:
        """The library that runs the op; None for a fused op that is taken apart, and where the
        table has no libraries."""
        return None

    def recorder(self) -> Recorder | None:
        """None where ops cannot be recorded, or come from several libraries."""
        return None

    def close(self) -> None: ...


Replay = Callable[[], None]
"""Runs the ops of a recording again, on what their inputs hold by now, into the same outputs."""


class Recorder(ABC):
    """Ops recorded as they run, to be replayed in one call."""

    @abstractmethod
    def record(self, step: Callable[[], Tensor]) -> tuple[Tensor, Replay | None, str]:
        """Run ``step`` -> (its result, the replay, why there is none). There is none when anything
        but ops of the library computed."""


class OpLibrary(OpTable, ABC):
    """A set of ops from one source. It implements any subset and names it in ``implements``: only
    the methods of these need be written. The others raise NotImplementedError; the table never
    calls them."""

    implements: frozenset[str] = frozenset(OpTable.OPS)
    traceable: ClassVar[bool] = False
    """Whether its ops are torch code that can be traced, whatever the sizes of a batch."""
    asks_host: ClassVar[frozenset[str]] = frozenset()
    """Ops that read values of tensors on the host: no graph of an accelerator can take them in."""

    @classmethod
    def preview(cls, **arguments: Any) -> OpLibrary:
        """An object for ``explain``, made of the constructor's arguments: it is asked for
        ``implements`` and ``describe`` alone. A library that compiles when it is built does not
        here, and says in ``describe`` that it will."""
        return cls(**arguments)

    def describe(self) -> dict[str, str]:
        """As in the table, of the ops that it implements; another may be named with the reason why
        it is not."""
        return dict.fromkeys(sorted(self.implements), type(self).__name__)

    def library_of(self, op: str) -> OpLibrary | None:
        return self if op in self.implements else None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise _absent(self, "rms_norm")

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        raise _absent(self, "add_rms_norm")

    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        raise _absent(self, "rotary_embedding")

    def silu_and_mul(self, x: Tensor) -> Tensor:
        raise _absent(self, "silu_and_mul")

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        raise _absent(self, "gelu_tanh_and_mul")

    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        raise _absent(self, "linear")

    def quantized_linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        raise _absent(self, "quantized_linear")

    def gated_linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        raise _absent(self, "gated_linear")

    def gated_quantized_linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        raise _absent(self, "gated_quantized_linear")

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        raise _absent(self, "embedding")

    def fused_experts(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Activation,
    ) -> Tensor:
        raise _absent(self, "fused_experts")

    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        raise _absent(self, "write_kv")

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
        raise _absent(self, "paged_attention")

    def greedy_sample(self, logits: Tensor) -> Tensor:
        raise _absent(self, "greedy_sample")

    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        raise _absent(self, "top_k_top_p_sample")


def _absent(library: OpLibrary, op: str) -> NotImplementedError:
    return NotImplementedError(f"{type(library).__name__} has no {op}")
