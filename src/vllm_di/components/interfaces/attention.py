"""For whoever brings attention: the batch of a step, the KV cache, and what reads both."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vllm_di.components.interfaces.device import Device
from vllm_di.components.interfaces.ops import Reuse
from vllm_di.components.messages import KvSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(slots=True)
class GroupTables:
    """Where the tokens of a step lie in the cache of one KvGroup."""

    seq_lens: Tensor  # [seqs] int32, as in BatchPlan
    block_table: Tensor  # [seqs, max_blocks] int32
    slot_mapping: Tensor  # [tokens] int64, -1 for padding
    seq_lens_host: list[int]


@dataclass(frozen=True, slots=True)
class PlanShape:
    """The sizes of a BatchPlan: what a compiler with static shapes compiles for."""

    tokens: int
    rows: int
    """Of logits."""
    seqs: int
    columns: int
    """Of the widest block table."""
    queries: int
    """Tokens of the sequence that has the most in the step; 1 in a decode step."""


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
    padded_to: PlanShape | None = None
    """The static shape that a ShapePolicy padded it to."""
    token_types: Tensor | None = None  # [tokens] int64, of models that have some

    @property
    def shape(self) -> PlanShape:
        """Its sizes as they are."""
        tables = (self.block_table, *(group.block_table for group in self.more_groups))
        return PlanShape(
            tokens=len(self.token_ids),
            rows=len(self.logits_rows),
            seqs=len(self.seq_lens),
            columns=max(table.shape[1] for table in tables),
            queries=self.max_query_len,
        )

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
        """Of a plan with a static shape that of the shape."""
        if self.padded_to is not None:
            return self.padded_to.queries
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
    sinks: Tensor | None = field(default=None, compare=False)  # [num_heads], any float dtype
    """A learnt score of each head that joins its softmax and adds no value. Only for a backend with
    ``takes_sinks``."""
    causal: bool = True
    """False, in encoders: a token sees all of its sequence, which runs whole; nothing is cached.
    Only for a backend with ``takes_bidirectional``."""


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


def fixed(*dims: int) -> Any:
    """A field of exported metadata whose dimensions ``dims`` have one size in every plan, such as
    [3]."""
    return field(metadata={"fixed": dims})


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
    gathers_blocks: bool = False
    """Whether it has ``gather_blocks``."""

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

    def gather_blocks(self, cache: LayerCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens behind a block table [seqs, columns] int64: k, v [seqs, columns * block_size,
        kv_heads, head_size], in torch ops that a compiled program can trace. Called only of
        layouts that say ``gathers_blocks``."""
        raise NotImplementedError(f"the KV layout {self.name!r} has no gather_blocks()")


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
    block_sizes: ClassVar[Sequence[int]] = ()
    """Tokens in a block that it reads, what suits it best first: that is what
    ``kv_layout.block_size=auto`` takes. Empty: any, and the layout decides."""
    reuses: frozenset[Reuse] = frozenset()
    """``record`` and ``capture``: all that ``forward`` computes are ops of the table, on tensors of
    the metadata. A compiler asks for ``export`` instead."""

    takes_sinks: ClassVar[bool] = False
    """Whether it heeds ``AttentionSpec.sinks``; models that have them are refused elsewhere."""

    takes_bidirectional: ClassVar[bool] = False
    """Whether ``forward`` heeds ``AttentionSpec.causal``; encoders are refused elsewhere. Its cache
    has no tensors then."""

    def reuses_step(self, metadata: Any) -> frozenset[Reuse]:
        """As ``reuses``, of the step of ``metadata``: one may be less than steps in general."""
        return self.reuses

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
        and dtypes for every plan. A dimension that is the same for every plan is named in the
        field: ``counts: Tensor = fixed(0)``.

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
