"""For whoever runs a model another way: the step, its weights, its graph, its shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_di.components.interfaces.attention import BatchPlan, LayerCache
from vllm_di.components.interfaces.ops import Activation
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
