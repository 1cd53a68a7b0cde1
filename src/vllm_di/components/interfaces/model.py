"""For whoever runs a model another way: the step, its weights, its graph, its shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vllm_di.components.interfaces.attention import BatchPlan, LayerCache, PlanShape
from vllm_di.components.interfaces.ops import Activation, Reuse
from vllm_di.components.messages import KvGroup, KvSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vllm_di.components.quantized import QuantizedWeight


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
    token_types: Tensor | None = None  # [tokens] int64; None where Model.token_types is 0


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Rows of a tensor of the checkpoint, and how tensor parallelism shares them out."""

    name: str
    """In the checkpoint, as Hugging Face names it."""
    start: int
    rows: int
    """It is rows [start, start + rows) of that tensor, whole."""
    shard_dim: int | None = None
    """The dimension that is cut; None: every rank has all of it."""
    num_shards: int = 1
    """Equal pieces, the last padded with zeros. Rank r of w has piece r * num_shards // w."""
    offset: float = 0.0
    """Added to the checkpoint's values."""
    first_rank_only: bool = False
    """Zero on the other ranks: a bias that is added before a sum over ranks."""


@dataclass(frozen=True, slots=True)
class NamedWeight:
    """A tensor of a loaded model, and what of the checkpoint it holds."""

    tensor: Tensor
    """This rank's."""
    parts: tuple[WeightPart, ...]
    """Stacked by rows, in this order; ``tensor`` may be a view of that with more dimensions."""


ExpertsFunction = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""x [tokens, hidden], topk_weights [tokens, k], topk_ids [tokens, k] int64 -> [tokens, hidden]: as
``OpTable.fused_experts``."""
StepFunction = Callable[[ModelStep], "Tensor"]
"""``Model.forward``, or what a graph policy runs in its place."""


class Quantization(ABC):
    """(8) What becomes of a linear weight after loading, and the product that goes with it."""

    reuses: ClassVar[frozenset[Reuse]] = frozenset()
    """``record`` and ``capture``: all that its products compute are ops of the table."""
    takes_quantized: ClassVar[bool] = False
    """Whether it wants weights as a quantised checkpoint holds them, not dequantised."""
    takes_experts: ClassVar[bool] = False
    """With ``takes_quantized``: whether ``experts`` takes such weights too. Experts of a checkpoint
    are dequantised else."""
    takes_order: ClassVar[bool] = False
    """With ``takes_quantized``: whether it heeds ``QuantizedWeight.order``. Weights in act-order
    are dequantised or refused else."""
    experts_ask_host: bool = False
    """Whether the function of ``experts`` reads values of tensors on the host: such a step is not
    captured."""

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

    def experts(
        self,
        gate_up: Sequence[Tensor | QuantizedWeight],
        down: Sequence[Tensor | QuantizedWeight],
        activation: Activation,
    ) -> ExpertsFunction | None:
        """As linear, for the MLPs of a layer's experts: gate_up [2 inter, hidden] and down [hidden,
        inter] of each, all of them quantised or none. None, for weights in floats alone: they stay
        as they are, and ``OpTable.fused_experts`` multiplies them."""
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
    causal: bool = True
    """False: an encoder, which keeps no cache and gives no tokens; prompts run whole."""
    pools_to: Literal["embedding", "score"] = "embedding"
    """What a pooled prompt becomes: ``score``, where the model has a head that scores a pair of
    texts. The rows of ``give_hidden`` are then what the head gives."""
    token_types: int = 0
    """Kinds of token (``ModelStep.token_types``) by which it tells the two texts of a pair apart;
    0: it does not."""
    reuses: frozenset[Reuse] = frozenset()
    """``record`` and ``capture``: all that ``forward`` computes are ops of the table, attention and
    collectives."""
    takes_quantized: bool = False
    """Whether ``load_weights`` wants quantised weights as they are."""
    takes_order: bool = False
    """With ``takes_quantized``: whether it heeds ``QuantizedWeight.order``."""

    @abstractmethod
    def kv_specs(self) -> list[KvSpec]:
        """One for each layer that keeps a cache, in layer order."""

    @abstractmethod
    def load_weights(self, weights: Iterator[tuple[str, Any]]) -> None:
        """Take the checkpoint's tensors (HF names, host) in any order, keep this rank's share. With
        ``takes_quantized`` some may be QuantizedWeights.
        Raises CheckpointError that names missing, unexpected and misshaped tensors. Ends with
        ``finalize``."""

    def keeps_quantized(self, name: str) -> bool:
        """Whether ``load_weights`` multiplies the weight of this name (of the checkpoint) as a
        QuantizedWeight, and does not widen it."""
        return self.takes_quantized

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

    def give_hidden(self) -> int:
        """Called once and before the weights come, where prompts are pooled: from here on
        ``logits`` gives the rows of ``hidden`` that it is given, in fp32, and a head is neither
        needed nor loaded -> the width of a row. Raises ConfigError of a model that cannot."""
        from vllm_di.errors import ConfigError

        raise ConfigError(
            f"{type(self).__name__} has no give_hidden(), and gives nothing to pool; take "
            "pooler=none",
            key="pooler",
        )

    def named_weights(self) -> Iterator[NamedWeight]:
        """The loaded tensors that hold weights as the checkpoint has them, so that a compiler can
        shard them and keep them apart from the program. What was packed or rounded is left out."""
        return iter(())

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

    @property
    def num_compiles(self) -> int:
        """Graphs compiled since the start, for ``ModelProgram.num_compiles``; 0 of a policy that
        compiles none."""
        return 0

    @abstractmethod
    def wrap(self, forward: StepFunction) -> StepFunction:
        """The function that runs in place of ``forward``. Called once."""

    def capture(self, sizes: Sequence[int], run: Callable[[int], object]) -> None:
        """Capture a graph for each size by calling ``run(size)``, a decode step of that many
        sequences: those of the shape policy's warm-up. Eager policies do nothing."""

    def place(self, plan: BatchPlan) -> tuple[BatchPlan, Sequence[Any]]:
        """Called before each step -> the plan that the step sees, and each KvGroup's metadata to
        build into (``AttentionBackend.build``), or nothing. Where a graph is captured for it, the
        plan is copied to the addresses that the graph reads."""
        return plan, ()

    def close(self) -> None: ...


class ShapePolicy(ABC):
    """(2) Which batch shapes the device sees."""

    @abstractmethod
    def pad(self, plan: BatchPlan) -> BatchPlan:
        """``plan`` as the device is to see it; called for each step.

        What is added touches no block that a sequence owns. Padding tokens come last and belong to
        no sequence; their slot is -1, or lies in block 0 where ``LimitsReport.null_block`` keeps
        that free. Padding sequences have no query and no context, in the host lists too. Padding
        rows of logits are row 0 and come last. A plan of a static shape says so in ``padded_to``.
        Raises ValueError for a plan beyond the largest shape: constructors refuse what could lead
        to one, naming the key to change.
        """

    def warm_up_plans(
        self, largest: PlanShape, blank: Callable[[PlanShape], BatchPlan]
    ) -> Iterator[BatchPlan]:
        """Plans to run once before the first request, padded as steps are: with static shapes one
        of each. ``largest`` has the most that a step can have of each size; ``blank`` makes a plan
        of a shape within it, which touches no block and is good until the next one is made."""
        yield self.pad(blank(PlanShape(tokens=1, rows=1, seqs=1, columns=1, queries=1)))


class ModelProgram(ABC):
    """(10) How one step runs: the module called eagerly, or a whole compiled step."""

    cache_dir: str | None = None
    """Folder in which compiled programs are kept, each under its ``compile_key``
    (``components/program/compile_cache.py``); None: nowhere."""

    @property
    def num_compiles(self) -> int:
        """Programs compiled since the start. One more after a step means that the step waited for
        its compiler: that is counted, and an error where ``capabilities.static_shapes``."""
        return 0

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        """Called once, when the weights are loaded and before the cache is sized: compile here
        what suits any shape."""

    def compile(self, plan: BatchPlan) -> None:
        """Compile for the shape of ``plan``. Called between ``prepare`` and ``allocate`` for each
        plan of ``ShapePolicy.warm_up_plans``, so that the cache gets what memory is left."""

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
        states [tokens, hidden] for the next one, in the model's dtype. Padding rows may hold
        anything."""

    def warm_up(self, plan: BatchPlan) -> Tensor:
        """Have the shape of ``plan`` ready, called after ``allocate`` for each plan of
        ``ShapePolicy.warm_up_plans`` -> as ``run``, of which the shape and dtype alone matter. By
        default it is run."""
        return self.run(plan)

    def close(self) -> None: ...
