"""Every interface of the engine, and the in-process values that cross them: the page that a port's
author reads.

A slot of a container (``containers/slots.py``) is filled by one class that implements one
interface here. What crosses a *process* boundary is in ``messages.py``. Importing this page costs
nothing: torch is named in annotations only.

Conventions: ``num_`` counts, sizes are in elements unless the name says ``bytes``, shapes stand in
brackets, ``rank`` counts from 0. A constructor parameter that bears a slot's name is injected;
every other one is a key of the YAML node.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from vllm_di.components.messages import (
    CacheSize,
    EngineOutputs,
    EngineRequest,
    EngineStats,
    KvGroup,
    KvSpec,
    LimitsReport,
    Peer,
    SampledTokens,
    SamplingParams,
    StepInput,
    StepPlan,
    StepResult,
    TokenOutput,
    WorkerReport,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vllm_di.components.quantized import QuantizedWeight

INTERFACE_VERSION = "2.0"
"""Of this page and of ``messages.py``; docs/interface-versions.md has the policy."""

Activation = Literal["silu", "gelu_tanh"]
"""Of a gated MLP."""

# ================================================================================================
# Worker container: one per rank. The ten seams are marked (1) to (10).


@dataclass(frozen=True, slots=True)
class Placement:
    """Given, not chosen: where this worker stands among its peers."""

    rank: int = 0
    world_size: int = 1
    rendezvous: str = ""
    """For more than one rank ``file://PATH``: a file of torch's FileStore, absent at first, in a
    folder that the user alone can enter."""
    stage: int = 0
    """Which part of a pipeline this is; ranks are counted within a stage."""
    num_stages: int = 1


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes. On the host, ``total`` may be a declared budget, and ``free`` what is left of it."""

    free: int
    total: int


class Device(ABC):
    """(1) The device of one rank: memory, dtypes, copies."""

    torch_device: torch.device
    default_dtype: torch.dtype
    supported_dtypes: tuple[torch.dtype, ...]
    """For weights and activations. A dtype outside is an error, never a cast."""
    on_host: ClassVar[bool] = False
    """Whether its tensors lie in memory that other processes of this host could map."""

    @abstractmethod
    def memory(self) -> DeviceMemory | None:
        """Free and total memory now. None: it cannot tell, and the config must size the KV cache
        (``worker.num_blocks`` or ``worker.kv_cache_memory``)."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when all work submitted so far is done."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A zeroed tensor on the device; a host may leave its pages to be touched first on use."""
        import torch

        return torch.zeros(tuple(shape), dtype=dtype, device=self.torch_device)

    def host_zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A zeroed host tensor to copy to the device from, pinned where that is of use."""
        import torch

        return torch.zeros(tuple(shape), dtype=dtype)

    def mark(self) -> Callable[[], None]:
        """A mark behind all work submitted so far -> a function that returns when that is done."""
        return self.synchronize

    def dtype(self, name: str) -> torch.dtype:
        """``auto`` or a torch dtype's name, checked against ``supported_dtypes``. Raises
        ConfigError."""
        import torch

        from vllm_di.errors import ConfigError, nearest

        names = {str(d).removeprefix("torch."): d for d in self.supported_dtypes}
        if name == "auto":
            return self.default_dtype
        if name not in names:
            known = isinstance(getattr(torch, name, None), torch.dtype)
            why = f"{type(self).__name__} does not support it" if known else "no such dtype"
            raise ConfigError(
                f"dtype {name!r}: {why}; choose auto, {', '.join(names)}{nearest(name, names)}"
            )
        return names[name]

    def close(self) -> None:
        """Release what the device holds."""


class Communicator(ABC):
    """(9) Collectives among the ranks of one tensor-parallel group. All ranks make the same calls
    in the same order."""

    rank: int
    world_size: int

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks; may work in place. Bit-equal on all ranks afterwards."""

    @abstractmethod
    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Concatenate the ranks' equal-shaped tensors along ``dim``, in rank order."""

    def close(self) -> None:
        """Leave the group."""


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
        """logits [rows, vocab] fp32 -> argmax [rows] int64, the lowest id on a tie; of a row
        with a NaN the id of one, as in torch.argmax."""

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


@dataclass(slots=True)
class GroupTables:
    """Where the tokens of a step lie in the cache of one KvGroup."""

    seq_lens: Tensor  # [seqs] int32, as in BatchPlan
    block_table: Tensor  # [seqs, max_blocks] int32
    slot_mapping: Tensor  # [tokens] int64, -1 for padding
    seq_lens_host: list[int]


@dataclass(slots=True)
class BatchPlan:
    """One step's batch on the device: the common ground of every attention backend. Rows are
    tokens.

    An attention backend sees the tables of one KvGroup. Those of a sliding window begin with the
    first block that a query of the step can see: ``seq_lens`` counts from there, ``positions`` do
    not.
    """

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    query_start: Tensor  # [seqs + 1] int32, cumulative query lengths
    seq_lens: Tensor  # [seqs] int32, context length after this step, from the table's first block
    block_table: Tensor  # [seqs, max_blocks] int32
    slot_mapping: Tensor  # [tokens] int64, -1 for padding
    logits_rows: Tensor  # [rows] int64, the token rows whose logits are wanted
    query_lens_host: list[int] = field(default_factory=list)
    seq_lens_host: list[int] = field(default_factory=list)
    hidden: Tensor | None = None  # [tokens, hidden] from the stage before; None on the first
    more_groups: Sequence[GroupTables] = ()
    """Tables of the second KvGroup and those after it; an attention backend is not shown them."""

    @property
    def num_groups(self) -> int:
        return 1 + len(self.more_groups)

    def of_group(self, group: int) -> BatchPlan:
        """The batch as the attention of one KvGroup sees it."""
        if not self.more_groups:
            return self
        if group == 0:
            return replace(self, more_groups=())
        tables = self.more_groups[group - 1]
        return replace(
            self,
            seq_lens=tables.seq_lens,
            block_table=tables.block_table,
            slot_mapping=tables.slot_mapping,
            seq_lens_host=tables.seq_lens_host,
            more_groups=(),
        )

    @property
    def max_query_len(self) -> int:
        return max(self.query_lens_host, default=0)

    @property
    def max_seq_len(self) -> int:
        return max(self.seq_lens_host, default=0)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What is fixed about one attention layer on this rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """One tensor of a layer's cache, as its KvLayout describes it."""

    name: str
    """``key``, ``value``, ``latent``, ``key_scale``, ..."""
    shape: tuple[int, ...]
    """Of one block."""
    dtype: torch.dtype
    block_dim: int = 0
    """Where the dimension of blocks stands among those of ``shape``: 1 in [2, blocks, ...]."""

    @property
    def bytes_per_block(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole_shape(self, num_blocks: int) -> tuple[int, ...]:
        return (*self.shape[: self.block_dim], num_blocks, *self.shape[self.block_dim :])


@dataclass(slots=True)
class LayerCache:
    """One layer's part of the KV cache: the tensors that ``KvLayout.describe`` names, in its
    order."""

    tensors: tuple[Tensor, ...]

    @property
    def key(self) -> Tensor:
        """The first tensor: the keys, of a layout that has them apart from the values."""
        return self.tensors[0]

    @property
    def value(self) -> Tensor:
        """The second tensor: the values, of such a layout."""
        return self.tensors[1]


@dataclass(slots=True)
class TracedCache(LayerCache):
    """As attention sees it while a step is traced for a compiler."""

    new: tuple[Tensor, Tensor] | None = None
    """Keys and values of the step, [tokens, kv_heads, head_size], where attention leaves it to the
    program to write them after the step; None where a node of the graph writes."""


class KvLayout(ABC):
    """(5) Owns the block size and the shape of the cache. Nobody else knows where a token lies."""

    name: str
    """The shape's name, which attention backends declare: ``hnd`` is [blocks, kv_heads, block_size,
    head_size]."""
    block_size: int
    device: Device
    """Where the cache is allocated."""
    dtype_name: str = "auto"
    """The cache's dtype; ``auto`` is the model's."""

    @abstractmethod
    def describe(self, spec: KvSpec, dtype: torch.dtype) -> tuple[CacheTensor, ...]:
        """The tensors that a layer's cache consists of; ``dtype`` is the model's."""

    def bytes_per_block(self, specs: Sequence[KvSpec], dtype: torch.dtype) -> int:
        """Bytes that one block takes over all these layers."""
        return sum(t.bytes_per_block for spec in specs for t in self.describe(spec, dtype))

    def allocate(
        self, specs: Sequence[KvSpec], num_blocks: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        """The cache, one entry for each layer, zeroed."""

        def layer(spec: KvSpec) -> LayerCache:
            tensors = self.describe(spec, dtype)
            return LayerCache(
                tuple(self.device.zeros(t.whole_shape(num_blocks), t.dtype) for t in tensors)
            )

        return [layer(spec) for spec in specs]

    @abstractmethod
    def write(self, cache: LayerCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """k, v [tokens, kv_heads, head_size] into their slots."""

    @abstractmethod
    def gather(self, cache: LayerCache, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` tokens behind one row of a block table: k, v [length, kv_heads,
        head_size]."""


class UnrotatedForward(Protocol):
    """As ``AttentionBackend.forward``, with q and k before rotary: their pairs (i, i + rotary_dim /
    2) are rotated as by ``OpTable.rotary_embedding``."""

    def __call__(
        self,
        positions: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        cache: LayerCache,
        metadata: Any,
        spec: AttentionSpec,
    ) -> Tensor: ...


class AttentionBackend(ABC):
    """(6) Attention over the KV cache. Workspaces belong to the backend."""

    layouts: ClassVar[tuple[str, ...]] = ("hnd",)
    """Names of the KV layouts that it reads."""
    replayable: ClassVar[bool] = False
    """Whether all that ``forward`` computes are ops of the table, on tensors of the metadata."""

    def can_replay(self, metadata: Any) -> bool:
        """Whether the step of ``metadata`` is one of those; asked where ``replayable``."""
        return True

    @abstractmethod
    def build(self, batch: BatchPlan, out: Any | None = None) -> Any:
        """Metadata of one step, from the plan alone; into ``out`` when given (captured graphs need
        fixed addresses)."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        """q [tokens, heads, head_size], k and v [tokens, kv_heads, head_size], all after rotary.
        Writes k and v to the cache, then attends causally. -> [tokens, heads, head_size]."""

    def unrotated(self) -> UnrotatedForward | None:
        """What takes the place of ``forward`` in layers with rotary embedding; None where the two
        are not to be fused."""
        return None

    def check(self, spec: AttentionSpec) -> None:
        """Raise ConfigError for a head size, window or soft cap that it cannot do."""

    def export(self) -> Any:
        """For programs that trace a step and compile it: the function that they call in place of
        ``build``, BatchPlan -> metadata, a dataclass of tensors alone with the same fields, ranks
        and dtypes for every plan.

        Given such metadata, ``forward`` is traced: torch ops that suit any sizes, or one custom op
        that the platform's compiler knows. The cache is a TracedCache then: the custom op writes to
        it in place, or ``forward`` leaves keys and values in its ``new``. Raises ConfigError when
        there is none.
        """
        from vllm_di.errors import ConfigError

        raise ConfigError(
            f"{type(self).__name__} has no export() for compiled programs; attention=sdpa has one"
        )

    def close(self) -> None: ...


@dataclass(slots=True)
class ModelStep:
    """What the model is given in one step. A graph policy takes it whole and hands it on, so that a
    new field here breaks none."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    caches: Sequence[LayerCache]  # one for each layer that keeps a cache, in layer order
    groups: Sequence[int]  # the KvGroup of each of these layers
    metadata: Sequence[Any]  # of the attention backend, one for each KvGroup
    hidden: Tensor | None = None  # [tokens, hidden] from the stage before; None on the first


StepFunction = Callable[[ModelStep], "Tensor"]
"""``Model.forward``, or what a graph policy runs in its place."""


class Quantization(ABC):
    """(8) What becomes of a linear weight after loading, and the product that goes with it."""

    replayable: ClassVar[bool] = False
    """Whether all that its products compute are ops of the table."""
    takes_quantized: ClassVar[bool] = False
    """Whether it wants weights as a quantised checkpoint holds them, not dequantised."""

    @abstractmethod
    def linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """weight [out, in] of this rank, loaded -> a function x [tokens, in] -> [tokens, out] in
        ``out_dtype`` (x's by default). It must not keep ``weight`` alive beside a packed copy. A
        QuantizedWeight comes only where ``takes_quantized``."""

    def tied_linear(
        self, weight: Tensor | QuantizedWeight, dtype: torch.dtype, out_dtype: torch.dtype
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        """As linear, for a weight [vocab, hidden] that embeds tokens too -> (the product, token_ids
        [tokens] -> rows [tokens, hidden] in ``dtype``). The second is None where packed rows cannot
        be read, or were rounded: then the model keeps a table beside them."""
        return self.linear(weight, None, out_dtype), None

    def gated_linear(
        self, weight: Tensor | QuantizedWeight, bias: Tensor | None, activation: Activation
    ) -> Callable[[Tensor], Tensor] | None:
        """As linear, with the gate of an MLP behind the product (``OpTable.gated_linear``); None
        where the two are not to be fused."""
        return None

    def num_bytes(self, weight: Tensor | QuantizedWeight) -> int:
        """What the weight takes once it is packed."""
        return weight.nbytes


class Model(ABC):
    """A causal language model on one rank. A native one is an ``nn.Module`` built from injected
    layers."""

    vocab_size: int
    hidden_size: int = 0
    """Width of the hidden states that cross between stages; a model that can be one sets it."""
    max_model_len: int
    eos_token_ids: list[int]
    dtype: torch.dtype
    first: bool = True
    """Whether it starts from token ids; else from the hidden states of the stage before."""
    last: bool = True
    """Whether it ends in logits; else in hidden states for the next stage."""
    replayable: bool = False
    """Whether all that ``forward`` computes are ops of the table, attention and collectives."""
    takes_quantized: bool = False
    """Whether ``load_weights`` wants quantised weights as they are."""

    @abstractmethod
    def kv_specs(self) -> list[KvSpec]:
        """One for each layer that keeps a cache, in layer order."""

    @abstractmethod
    def load_weights(self, weights: Iterator[tuple[str, Any]]) -> None:
        """Take the checkpoint's tensors (HF names, host) in any order, keep this rank's share. With
        ``takes_quantized`` some may be QuantizedWeights.
        Raises CheckpointError that names missing, unexpected and misshaped tensors. Ends with
        ``finalize``."""

    @abstractmethod
    def load_random(self, seed: int) -> None:
        """Fill with random weights (std 0.02), the same on every rank, then ``finalize``."""

    @abstractmethod
    def forward(self, step: ModelStep) -> Tensor:
        """-> hidden states [tokens, hidden]: on the last stage after the last norm, else the
        residual stream. May overwrite ``step.hidden``."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> [rows, vocab] fp32, whole on every rank. On the last stage
        alone."""

    def weight_bytes(self) -> int:
        """Bytes that the weights take on this rank."""
        return 0

    def release(self) -> None:
        """Drop the weights: a compiled program has its own. Nothing is run after that."""


class Loader(ABC):
    """Brings weights into a model."""

    @abstractmethod
    def load(self, model: Model) -> None:
        """Fill ``model``. Raises CheckpointError naming the file and the tensor."""


class GraphPolicy(ABC):
    """(4) Compile, capture and replay of a step function."""

    @abstractmethod
    def wrap(self, forward: StepFunction) -> StepFunction:
        """The function that runs in place of ``forward``. Called once."""

    def capture(self, sizes: Sequence[int], run: Callable[[int], object]) -> None:
        """Capture a graph for each token count by calling ``run(size)``, a decode step of that many
        sequences. Eager policies do nothing."""

    def place(self, plan: BatchPlan) -> tuple[BatchPlan, Sequence[Any]]:
        """Called before each step -> the plan that the step sees, and each KvGroup's metadata to
        build into (``AttentionBackend.build``), or nothing. Where a graph is captured for it, the
        plan is copied to the addresses that the graph reads."""
        return plan, ()

    def close(self) -> None: ...


class ShapePolicy(ABC):
    """(2) Which batch shapes the device sees."""

    @abstractmethod
    def padded_tokens(self, num_tokens: int) -> int:
        """Rows that a step of ``num_tokens`` is padded to."""

    def warm_up_sizes(self, max_num_tokens: int) -> list[int]:
        """Token counts to run once before the first request."""
        return [1]


class ModelProgram(ABC):
    """(10) How one step runs: the module called eagerly, or a whole compiled step."""

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        """Called once, when the weights are loaded and before the cache is sized: compile here."""

    @abstractmethod
    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        """Allocate the cache, which the program owns; all groups draw from ``num_blocks``. Called
        once, after ``prepare``."""

    @property
    @abstractmethod
    def caches(self) -> Sequence[LayerCache]:
        """The cache as it is now, one entry for each layer that keeps one. A program that replaces
        its cache in each step gives the last one: it is good until the next step."""

    @abstractmethod
    def run(self, plan: BatchPlan) -> Tensor:
        """-> logits [len(plan.logits_rows), vocab] fp32; on a stage that is not the last, hidden
        states [tokens, hidden] for the next one, in the model's dtype."""

    def close(self) -> None: ...


class SchedulerLimits(ABC):
    """(3) Plain data that a platform gives the one scheduler."""

    @abstractmethod
    def report(self) -> LimitsReport: ...


@dataclass(slots=True)
class SequenceState:
    """What a worker keeps of one live sequence."""

    seq_id: int
    params: SamplingParams
    token_ids: list[int]
    """Prompt and all generated tokens known so far."""
    prompt_len: int
    block_ids: list[list[int]]
    """Of each KvGroup. Blocks that a sliding window has left still stand here."""
    eos_token_ids: list[int]
    bad_words_token_ids: list[list[int]]
    sampler_state: Any = None
    """Belongs to the sampler: generator, counts, masks."""

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len


class Sampler(ABC):
    """Chooses one token for each row."""

    request_faults: ClassVar[frozenset[str]] = frozenset()
    """Of the reasons that ``sample`` gives for failed rows, those that a request's own parameters
    cause: such a request is answered with 400, the others with 500."""

    @abstractmethod
    def sample(
        self, logits: Tensor, rows: Sequence[SequenceState]
    ) -> tuple[list[SampledTokens], dict[int, str]]:
        """logits [rows, vocab] fp32 (may be overwritten) -> one token a row, and seq_id -> reason
        for rows that failed (NaN). A row's result depends on that row alone."""

    def prompt_logprobs(self, logits: Tensor, token_ids: Sequence[int], count: int) -> list[Any]:
        """logits [rows, vocab] and the token that follows each row -> TokenLogprobs with ``count``
        alternatives."""
        raise NotImplementedError


class ModelRunner(ABC):
    """Turns a StepPlan into a BatchPlan, runs it, samples."""

    @abstractmethod
    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        """Allocate the KV cache. Called once, after the weights are loaded."""

    @abstractmethod
    def warm_up(self) -> None:
        """Run every shape once."""

    @abstractmethod
    def execute(self, step: StepInput) -> StepResult:
        """One step. Hidden states come from the stage before, and go to the next one in the result.
        On ranks other than 0 and on stages before the last the result's lists are empty."""

    def close(self) -> None: ...


class Worker(ABC):
    """One rank: loads the weights, compiles, allocates the cache, executes steps. Calls come in
    this order: the cache is sized when nothing else will take memory."""

    @abstractmethod
    def load(self) -> WorkerReport:
        """Load the weights. The number of blocks is not known yet: 0."""

    @abstractmethod
    def prepare(self, groups: list[KvGroup]) -> CacheSize:
        """Compile for these groups, which are those of all stages -> how many blocks fit then."""

    @abstractmethod
    def allocate(self, num_blocks: int) -> None:
        """Allocate the agreed number of blocks (the minimum over ranks) and warm up."""

    @abstractmethod
    def execute(self, step: StepInput) -> StepResult:
        """One step, as ``ModelRunner.execute``."""

    def close(self) -> None: ...


# ================================================================================================
# Engine container


class WorkerLauncher(ABC):
    """Given, not chosen: opens worker containers for an executor, which itself knows no
    container."""

    num_stages: int = 1
    """Stages that the model is cut into. Each wants a placement of its own."""

    @abstractmethod
    def open(self, placement: Placement) -> AbstractContextManager[Worker]:
        """A worker in this process."""

    @abstractmethod
    def command(self, placement: Placement, address: str) -> tuple[list[str], bytes]:
        """Argument list of a worker process that connects to the Unix socket ``address``, and the
        bytes to write to its standard input (the assembly)."""

    def place(self, stage: int, key: str) -> str:
        """Where a stage's dotted key was set and how it is called there, for messages."""
        return f"stages.{stage}.{key}"


class Executor(ABC):
    """Runs steps on the workers."""

    depth: int = 1
    """Steps that may be in flight at once; the report of ``start`` says it too."""
    patience: float | None = None
    """Seconds after which whoever watches this process may take a step for hung; None: never."""

    @abstractmethod
    def start(self) -> WorkerReport:
        """Start the workers, load the weights, allocate the cache. Called once."""

    @abstractmethod
    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Run one step, after those submitted before it; up to ``WorkerReport.depth`` may be in
        flight. The future holds rank 0's result, of the last stage, or EngineDeadError."""

    @abstractmethod
    def collective(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every rank's Worker with plain-data arguments; results in rank order."""

    def check_alive(self) -> None:
        """Raise EngineDeadError when a worker is gone."""

    def processes(self) -> list[Peer]:
        """The processes of the workers, and which of them give no sign of life. Called from any
        thread, between ``start`` and ``close``."""
        return []

    def close(self) -> None: ...


@dataclass(slots=True)
class Prefix:
    """What a scheduler keeps of one request for its cache manager, for as long as the request
    lives: a preempted one comes back with it."""

    token_ids: Sequence[int]
    """Prompt and generated tokens. They only grow."""
    salt: str | None = None
    lookup: bool = True
    """False: nothing may come from the cache, every token must run (to be scored)."""
    keys: Any = None
    """Belongs to the manager: the keys of the full blocks, each made once."""
    admitted: bool = False
    """Set by the manager. A later admission follows a preemption and counts in no statistics."""


class KvCacheManager(ABC):
    """Hands out blocks, shares full ones by the hash of their tokens, evicts the least recently
    used."""

    num_blocks: int
    block_size: int

    @abstractmethod
    def admit(
        self, seq_id: int, prefix: Prefix, take: Callable[[int], int]
    ) -> tuple[int, int] | None:
        """Start ``seq_id`` with the cached full blocks that its tokens begin with, all but the last
        token's (which must run), and with blocks for the ``take(cached)`` tokens behind them;
        return (cached, taken). None, and nothing has changed, when ``take`` says 0 or there are too
        few blocks: the head of the queue asks again in each step, so a refusal should be cheap."""

    @abstractmethod
    def num_missing(self, seq_id: int, num_tokens: int, num_computed: int) -> int:
        """How many blocks ``allocate`` lacks; 0 when it can."""

    @abstractmethod
    def allocate(self, seq_id: int, num_tokens: int, num_computed: int) -> list[list[int]] | None:
        """Give back the blocks of ``seq_id`` that no query from position ``num_computed`` on can
        see, then grow its block tables to hold ``num_tokens``. Return the blocks added to each
        KvGroup's, or None (and change nothing) when there are too few."""

    @abstractmethod
    def commit(self, seq_id: int, token_ids: Sequence[int], num_computed: int) -> None:
        """Blocks that ``num_computed`` tokens fill are complete: make them shareable."""

    @abstractmethod
    def free(self, seq_id: int) -> None:
        """Give back all blocks of ``seq_id``; unknown ids are ignored."""

    @abstractmethod
    def block_ids(self, seq_id: int) -> list[list[int]]:
        """The block table of each KvGroup; -1 stands for a block that its window has left."""

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks not held by a live sequence (cached ones count: they can be evicted)."""

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Forget every cached block that no live sequence holds."""

    @abstractmethod
    def stats(self) -> tuple[int, int]:
        """(tokens looked up, tokens found) since the start, each request counted once: when it is
        first admitted."""


class Drafter(ABC):
    """Guesses tokens that a sequence goes on with. Each is checked by the model in the next step:
    the answer is the same, it comes in fewer steps."""

    max_drafts: int = 0
    """Most tokens guessed at once."""

    def drafts_for(self, num_running: int) -> int:
        """How many tokens to guess for each decoding sequence of a step, when so many run: in a
        full batch a wrong guess takes the place of another's token."""
        return self.max_drafts

    @abstractmethod
    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        """What follows ``token_ids``, ``most`` tokens at most; [] for no idea. Called for every
        decoding sequence in every step, on the engine's thread."""


class Scheduler(ABC):
    """Chooses what runs in each step. Continuous batching: a step mixes decodes with chunks of
    prefills."""

    @abstractmethod
    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises RequestError (it can never fit) or QueueFullError."""

    @abstractmethod
    def abort(self, request_id: str) -> bool:
        """Forget a request in any phase and free its blocks; False when it is unknown."""

    @abstractmethod
    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run."""

    @abstractmethod
    def update(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Take a step's result; return what is new for each request."""

    @abstractmethod
    def has_work(self) -> bool: ...

    @abstractmethod
    def stats(self) -> EngineStats: ...


class StructuredOutput(ABC):
    """Constrains tokens to a grammar."""

    @abstractmethod
    def check(self, params: SamplingParams) -> None:
        """Raise RequestError for a request that this component cannot honour."""


class Engine(ABC):
    """Scheduler and executor in a loop. Single-threaded: one thread calls everything but ``abort``
    and ``add``, which it calls between steps."""

    report: WorkerReport

    @abstractmethod
    def add(self, request: EngineRequest) -> None:
        """Raises RequestError; the engine is unchanged then."""

    @abstractmethod
    def abort(self, request_id: str) -> None: ...

    @abstractmethod
    def has_work(self) -> bool: ...

    @abstractmethod
    def step(self) -> EngineOutputs:
        """Run one step to its end and return what is new."""

    @abstractmethod
    def reset_prefix_cache(self) -> None: ...

    patience: float | None = None
    """Its executor's."""

    def check_alive(self) -> None:
        """Raise EngineDeadError when a worker is gone. Called while there is nothing to do."""

    def processes(self) -> list[Peer]:
        """Its executor's. Called from any thread."""
        return []

    def close(self) -> None: ...


# ================================================================================================
# Server container: the API process. No torch here.


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocab_size: int
    eos_token_id: int | None
    bos_token: str | None
    eos_token: str | None

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    @abstractmethod
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    @abstractmethod
    def token_text(self, token_id: int) -> str:
        """The raw vocabulary entry, as ``convert_ids_to_tokens`` gives it."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for (OpenAI's ``bytes`` in log-probs)."""

    def is_special(self, token_id: int) -> bool:
        return False


class ChatTemplate(ABC):
    """Messages to a prompt."""

    @abstractmethod
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Raises RequestError for messages that the template refuses."""


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The next piece of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegun:
    """A tool call, told once: the arguments follow."""

    index: int
    """Among the calls of its choice, counted from 0 without gaps."""
    id: str
    """Unique, for the client to answer to."""
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next piece of a call's arguments. Joined, the pieces are the JSON object that OpenAI's
    ``arguments`` holds."""

    index: int
    text: str


ParserEvent = ContentDelta | ReasoningDelta | ToolCallBegun | ToolCallArguments


@dataclass(frozen=True, slots=True)
class ParserRequest:
    """What a parser may know of the request whose answer it reads."""

    fields: Mapping[str, Any]
    """The body's fields by name, as ``check`` saw them: ``tools``, ``tool_choice``, ..."""
    prompt: str
    """As rendered: some templates open the reasoning themselves."""


class ParserState(ABC):
    """One choice's text on its way through a parser.

    The text comes in deltas that may end anywhere, in the middle of a tag too; joined, the events
    of a text are the same however it was cut. An event is final: what may still turn out to be
    something else is held back. All text comes out, as content where it is nothing else; a
    malformed call is no error.
    """

    @abstractmethod
    def feed(self, delta: str) -> Sequence[ParserEvent]:
        """What the next piece of text, never an empty one, makes certain."""

    @abstractmethod
    def finish(self) -> Sequence[ParserEvent]:
        """What was held back, at the text's end. Called once, and last."""


class ToolParser(ABC):
    """Finds tool calls in generated text."""

    needs_special_tokens: ClassVar[bool] = False
    """Whether it looks for special tokens: these are then kept in the text, unless the request
    says otherwise."""

    @abstractmethod
    def check(self, request: Mapping[str, Any]) -> None:
        """Raise RequestError (code ``unsupported_parameter``) for a request that needs what this
        parser lacks."""

    @abstractmethod
    def start(self, request: ParserRequest) -> ParserState:
        """A state for one choice. Called only for requests with ``tools`` whose ``tool_choice`` is
        not ``none``; fed with what the reasoning parser left as content. Its events are content
        and tool calls."""


class ReasoningParser(ABC):
    """Parts reasoning from the answer."""

    needs_special_tokens: ClassVar[bool] = False
    """As for tool parsers."""

    @abstractmethod
    def check(self, request: Mapping[str, Any]) -> None:
        """Raise RequestError (code ``unsupported_parameter``) for a request that needs what this
        parser lacks."""

    @abstractmethod
    def start(self, request: ParserRequest) -> ParserState:
        """A state for one choice. Its events are reasoning and content."""


@dataclass(slots=True)
class RequestTimes:
    """Seconds and counts of one finished sequence, for the histograms."""

    finish_reason: str
    num_prompt_tokens: int
    num_generated_tokens: int
    max_tokens: int | None
    n: int
    end_to_end: float
    queue: float
    prefill: float
    decode: float


class Metrics(ABC):
    """Counts what the server does. Never labels anything with text from a request."""

    @abstractmethod
    def tokens(
        self,
        num_prompt: int,
        num_generated: int,
        first_after: float | None,
        inter_token: float | None,
    ) -> None:
        """One output of one sequence: new tokens; seconds to the first token, or since the previous
        output."""

    @abstractmethod
    def finished(self, times: RequestTimes) -> None: ...

    @abstractmethod
    def engine(self, stats: EngineStats) -> None: ...

    @abstractmethod
    def http(self, handler: str, status: int, seconds: float) -> None: ...

    @abstractmethod
    def info(self, report: WorkerReport, labels: Mapping[str, str]) -> None:
        """Static facts, once, when the engine is ready; ``labels`` are slot -> class name."""

    @abstractmethod
    def render(self) -> tuple[bytes, str]:
        """(body, content type) in Prometheus' text form."""


class EngineClient(ABC):
    """Given, not chosen: the frontend's line to the engine. Asyncio, one event loop."""

    state: Literal["starting", "ready", "dead"]
    failure: str | None
    stage: str
    """What a starting engine is doing: ``load``, ``warm-up``, ..."""
    report: WorkerReport | None
    on_stats: Callable[[EngineStats], None] | None = None
    """Called with the engine's gauges and totals after each of its messages."""
    silent: Sequence[str] = ()
    """Processes of a ready engine that give no sign of life: ``engine``, ``worker 1``."""
    restarts: int = 0
    """How often within ten minutes an engine that died may be replaced. The server sets it."""

    @abstractmethod
    def generate(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        """Submit now; yield outputs up to the one with a finish_reason. Closing the iterator early
        aborts the request. Raises RequestError (refused), EngineDeadError."""

    @abstractmethod
    async def wait_ready(self) -> None:
        """Raises EngineDeadError when the start failed."""

    async def wait_dead(self) -> None:
        """Raises EngineDeadError once the engine is dead for good. Waits for ever where nobody
        can tell."""
        from asyncio import Event

        await Event().wait()

    @abstractmethod
    async def close(self) -> None: ...


class Server(ABC):
    """The HTTP server."""

    @abstractmethod
    async def run(self) -> None:
        """Serve until told to stop (SIGTERM, SIGINT), then drain."""
