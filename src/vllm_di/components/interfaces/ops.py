"""For whoever brings kernels: the ops that models, attention and samplers call.

An op is declared once, as a method of ``OpTable``: its signature, its shapes, what it stands for.
The body is its reference. This page must not import torch, so that an op whose reference calls
functions of torch has it in ``components/ops/torch.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vllm_di.components.quantized import QuantizedWeight

Activation = Literal["silu", "gelu_tanh"]
"""Of a gated MLP."""
Reuse = Literal["record", "capture", "compile"]
"""How a step is run again without its Python: calls of ops that were recorded, a graph that the
device captured, a program that a compiler made. Each part of a step declares in ``reuses`` which of
these it can be part of; what it does not name is refused, or leaves steps as they stand."""
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Op:
    """What is declared of an op beside its signature."""

    text: str
    """One line, for ``--help``."""
    stands_for: tuple[str, ...] = ()
    """Ops that a fused op does in one. It runs only where all of them come from its own library;
    elsewhere the table runs the declared body, which calls them one by one."""
    goes_before: tuple[str, ...] = ()
    """Other fused ops that a layer which runs this one does not call. It is not in force where one
    of them is chosen and it is not."""
    pack: str = ""
    """The method that packs its weights, or knows how to read packed ones."""
    fp32: bool = False
    """Whether its input is fp32 whatever the model's dtype."""
    may_reuse: bool = False
    """Whether it may write into its inputs."""
    quantized: bool = False
    """Whether its weight is quantized."""


class Ops(dict[str, Op]):
    """Name to declaration of each op, in the order in which they are declared."""

    def op(
        self,
        text: str,
        *,
        stands_for: tuple[str, ...] = (),
        goes_before: tuple[str, ...] = (),
        pack: str = "",
        fp32: bool = False,
        may_reuse: bool = False,
        quantized: bool = False,
    ) -> Callable[[F], F]:
        """Declares the decorated method, and leaves it as it is."""

        def declare(method: F) -> F:
            self[method.__name__] = Op(
                text, stands_for, goes_before, pack, fp32, may_reuse, quantized
            )
            return method

        return declare

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Fused op to the ops that it stands for."""
        return {name: op.stands_for for name, op in self.items() if op.stands_for}


class OpTable(ABC):  # noqa: B024 - a table or a library, never built as it is
    """(7) The named ops that models, attention and samplers call.

    Inputs may be views with stride 1 in the last dimension. Outputs are new tensors unless the text
    says otherwise. Weights given to ``linear`` have been through ``pack_linear`` of the same
    library, once, after loading.
    """

    OPS: ClassVar[Ops] = Ops()
    """Every op by name."""
    fusions: Sequence[str] = ()
    """Fused ops in force."""

    @OPS.op("RMS normalisation")
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., hidden], weight [hidden]: x / sqrt(mean(x^2) + eps) * weight, reduced in fp32."""
        wide = x.float()
        wide = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        return (wide * weight.float()).to(x.dtype)

    @OPS.op("residual add and RMS normalisation in one", stands_for=("rms_norm",), may_reuse=True)
    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(s), s) with s = x + residual; may reuse the memory of ``x`` and
        ``residual``."""
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    @OPS.op("rotary position embedding", may_reuse=True)
    def rotary_embedding(
        self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        """q [tokens, heads, head_size], k [tokens, kv_heads, head_size], cos_sin [positions,
        rotary_dim] fp32 (cosines, then sines). Rotates the first rotary_dim elements of each head;
        may work in place. ``interleaved`` pairs (2i, 2i + 1), otherwise (i, i + rotary_dim / 2)."""
        raise _absent(self, "rotary_embedding")

    @OPS.op(
        "RMS normalisation and rotary position embedding of each head, in one",
        stands_for=("rms_norm", "rotary_embedding"),
        goes_before=("rotary_write_kv",),
        may_reuse=True,
    )
    def fused_qk_norm_rope(
        self,
        positions: Tensor,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        cos_sin: Tensor,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        """qkv [tokens, (num_heads + 2 num_kv_heads) * head_size]: a token's queries, keys, values;
        q_weight, k_weight [head_size]; the rest as in ``rotary_embedding``. Each head of the
        queries and of the keys is normalised as by ``rms_norm``, then rotated; between the two it
        may be rounded. -> queries [tokens, num_heads, head_size], keys [tokens, num_kv_heads,
        head_size]; may work in place, and leaves the values as they are."""
        size = q_weight.shape[0]
        widths = [num_heads * size, num_kv_heads * size, num_kv_heads * size]
        q, k, _ = qkv.split(widths, -1)
        q, k = q.view(-1, num_heads, size), k.view(-1, num_kv_heads, size)
        q, k = self.rms_norm(q, q_weight, eps), self.rms_norm(k, k_weight, eps)
        return self.rotary_embedding(positions, q, k, cos_sin, interleaved)

    @OPS.op("SiLU gate of the MLP")
    def silu_and_mul(self, x: Tensor) -> Tensor:
        """x [..., 2 d] -> silu(x[..., :d]) * x[..., d:]."""
        raise _absent(self, "silu_and_mul")

    @OPS.op("GELU gate of the MLP")
    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        """x [..., 2 d] -> gelu_tanh(x[..., :d]) * x[..., d:]."""
        raise _absent(self, "gelu_tanh_and_mul")

    def pack_linear(self, weight: Tensor) -> Any:
        """Weight [out, in] to whatever ``linear`` of this library likes best. The original may then
        be dropped."""
        return weight

    @OPS.op("GEMMs with weights, and their packing", pack="pack_linear")
    def linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [tokens, in], weight from ``pack_linear`` -> [tokens, out] in ``out_dtype`` (x's by
        default). Logits ask for fp32: rounded to bf16, likely tokens would tie."""
        raise _absent(self, "linear")

    def pack_quantized(self, weight: QuantizedWeight) -> Any:
        """As pack_linear, for ``quantized_linear``."""
        return weight

    @OPS.op(
        "GEMMs with quantized weights, and their packing", pack="pack_quantized", quantized=True
    )
    def quantized_linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As linear, on a weight from ``pack_quantized``. May round x to signed bytes on the way:
        by row or, for weights by group, by 32 inputs, with scale max |x| / 127."""
        raise _absent(self, "quantized_linear")

    def pack_gated_linear(self, weight: Tensor) -> Any:
        """As pack_linear, for ``gated_linear``."""
        return self.pack_linear(weight)

    @OPS.op(
        "a GEMM and the MLP's gate behind it in one",
        stands_for=("linear", "silu_and_mul", "gelu_tanh_and_mul"),
        pack="pack_gated_linear",
    )
    def gated_linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        """x [tokens, in], weight [2 d, in] from ``pack_gated_linear`` -> act(y[..., :d]) * y[...,
        d:] of y = linear(x, weight, bias), in x's dtype; y itself need not be rounded to it."""
        return _gate(self, self.linear(x, weight, bias), activation)

    def pack_gated_quantized(self, weight: QuantizedWeight) -> Any:
        """As pack_quantized, for ``gated_quantized_linear``."""
        return self.pack_quantized(weight)

    @OPS.op(
        "gated_linear with quantized weights",
        stands_for=("quantized_linear", "silu_and_mul", "gelu_tanh_and_mul"),
        pack="pack_gated_quantized",
        quantized=True,
    )
    def gated_quantized_linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        """As gated_linear, on a weight from ``pack_gated_quantized``."""
        return _gate(self, self.quantized_linear(x, weight, bias), activation)

    @OPS.op("token embedding", pack="packed_embedding")
    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """token_ids [tokens] int64, weight [vocab, hidden] -> [tokens, hidden]."""
        raise _absent(self, "embedding")

    def packed_embedding(
        self, weight: Any, dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor] | None:
        """For a ``weight`` [vocab, hidden] from ``pack_linear`` or ``pack_quantized``: token_ids
        [tokens] int64 -> [tokens, hidden] in ``dtype``, what ``embedding`` gives of the plain
        table. None where this library cannot read such a weight: then the table is kept."""
        return None

    @OPS.op("mixture-of-experts MLP")
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
        raise _absent(self, "fused_experts")

    @OPS.op("keys and values into their slots")
    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """k, v [tokens, kv_heads, head_size]; caches [blocks, kv_heads, block_size, head_size],
        written in place. Token i goes to slot s = slot_mapping[i] (int64): block s // block_size,
        offset s % block_size. s < 0: dropped."""
        raise _absent(self, "write_kv")

    @OPS.op(
        "rotary position embedding, and keys and values into their slots, in one",
        stands_for=("rotary_embedding", "write_kv"),
        may_reuse=True,
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
        """q and k as in ``rotary_embedding``, the rest as in ``write_kv``: rotates q and k, writes
        k and v. -> q [tokens, heads, head_size]; may rotate q and k in place."""
        q, k = self.rotary_embedding(positions, q, k, cos_sin, interleaved)
        self.write_kv(k, v, key_cache, value_cache, slot_mapping)
        return q

    @OPS.op("attention over block tables")
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
        raise _absent(self, "paged_attention")

    @OPS.op("argmax", fp32=True)
    def greedy_sample(self, logits: Tensor) -> Tensor:
        """logits [rows, vocab] fp32 -> argmax [rows] int64, the lowest id on a tie; -1 for a row
        whose largest entry is not finite, or that holds a NaN."""
        raise _absent(self, "greedy_sample")

    @OPS.op("sampling with top-k, top-p and min-p", fp32=True, may_reuse=True)
    def top_k_top_p_sample(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        """logits [rows, vocab] fp32, already scaled by temperature; top_k [rows] int64 (vocab =
        off), top_p, min_p and uniform [rows] fp32. Keeps the top k (ties at the threshold stay), of
        these the smallest set whose mass reaches top_p (at least one), of these those with p >=
        min_p * p_max; then inverts the renormalised cumulative mass, in order of falling
        probability (id on a tie), at ``uniform`` in [0, 1). -> [rows] int64."""
        raise _absent(self, "top_k_top_p_sample")

    def describe(self) -> dict[str, str]:
        """Op to where it runs, for ``explain``: ``cpu (avx512_bf16)``, ``torch (no compiler:
        ...)``."""
        return {name: type(self).__name__ for name in self.OPS}

    def library_of(self, op: str) -> OpLibrary | None:
        """The library that runs the op; None for a fused op that is taken apart, and where the
        table has no libraries."""
        return None

    def refuses(self, how: Reuse) -> Mapping[str, str]:
        """Op to its library, for the ops that cannot be part of such a step."""
        return {}

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
    """A set of ops from one source: any subset. The table takes the others from the reference."""

    implements: frozenset[str] = frozenset()
    """Ops that the table may take from it. A class that does not say has those of the class that it
    extends, and those that it has a method for."""
    methods: ClassVar[frozenset[str]] = frozenset()
    """Ops that it computes or packs for with a method of its own, or of a class that it extends;
    the reference's methods do not count."""
    reuses: ClassVar[frozenset[Reuse]] = frozenset()
    """``compile``: its ops are torch code that can be traced, whatever the sizes of a batch.
    ``record``: it has a recorder. ``capture``: a device's graph can hold them, but for those of
    ``asks_host``."""
    asks_host: ClassVar[frozenset[str]] = frozenset()
    """Ops that read values of tensors on the host."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        declared = cls.__dict__
        if "methods" not in declared:
            cls.methods |= {n for n, op in cls.OPS.items() if n in declared or op.pack in declared}
        if "implements" not in declared:
            cls.implements |= {name for name in cls.OPS if name in declared}

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


def _absent(library: OpTable, op: str) -> NotImplementedError:
    return NotImplementedError(f"{type(library).__name__} has no {op}")


def _gate(ops: OpTable, x: Tensor, activation: Activation) -> Tensor:
    return ops.silu_and_mul(x) if activation == "silu" else ops.gelu_tanh_and_mul(x)
