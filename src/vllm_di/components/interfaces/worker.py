"""For whoever changes what a worker does with a step: limits, sampler, runner, worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_di.components.messages import (
    CacheSize,
    KvGroup,
    LimitsReport,
    Pooling,
    SampledTokens,
    SamplingParams,
    StepInput,
    StepResult,
    WarmUp,
    WorkerReport,
)
from vllm_di.components.remote import remote

if TYPE_CHECKING:
    from torch import Tensor


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
    pooler_state: Any = None
    """Belongs to the pooler: what it keeps of the chunks that ran."""
    token_type_ids: Sequence[int] = ()
    """Of a prompt that is a pair of texts: one for each of its tokens."""

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len


class Sampler(ABC):
    """Chooses one token for each row."""

    request_faults: ClassVar[frozenset[str]] = frozenset()
    """Of the reasons that ``sample`` gives for failed rows, those that a request's own parameters
    cause: such a request is answered with 400, the others with 500."""

    def begin(self, rows: Sequence[SequenceState], drafts: Sequence[list[int]]) -> None:
        """Called before the step runs, with the sequences that ``sample`` will be given and the
        guesses of what follows each. What needs no logits can be worked out while the model runs,
        on a thread of the sampler's own: a grammar's mask of tokens."""
        return

    @abstractmethod
    def sample(
        self, logits: Tensor, rows: Sequence[SequenceState]
    ) -> tuple[list[SampledTokens], dict[int, str]]:
        """logits [rows, vocab] fp32 (may be overwritten) -> one token a row, and seq_id -> reason
        for rows that failed (NaN). A row's result depends on that row alone."""

    def warm_up(self, logits: Tensor) -> None:
        """Run or compile what ``sample`` runs. Called before the first request, once for each
        number of rows that a warm-up step gives: logits [rows, vocab] fp32. A sampler with static
        shapes pads to these numbers."""

    def prompt_logprobs(self, logits: Tensor, token_ids: Sequence[int], count: int) -> list[Any]:
        """logits [rows, vocab] and the token that follows each row -> TokenLogprobs with ``count``
        alternatives."""
        raise NotImplementedError(f"{type(self).__qualname__} scores no prompts")


class Pooler(ABC):
    """Makes one vector of a prompt's hidden states. A model either generates or pools: ``none``
    pools nothing."""

    every_token: ClassVar[bool] = False
    """Whether it reads all tokens of a prompt, so that none may come from the prefix cache."""

    def pools(self) -> bool:
        """Whether the model pools: then no request generates. Where not, nothing else is called."""
        return True

    @abstractmethod
    def report(self, size: int) -> Pooling:
        """What requests are told; ``size``: width of a row. Raises ConfigError for settings that do
        not fit it."""

    @abstractmethod
    def wanted(self, start: int, count: int, prompt_len: int) -> range:
        """The positions that it reads, of those in [start, start + count) of a prompt."""

    @abstractmethod
    def take(self, rows: Tensor, state: SequenceState) -> None:
        """rows [wanted, width] fp32, good until the step ends. A prompt comes in chunks, each of
        which is given once and in order; after a preemption from its beginning, with a new
        ``state``."""

    @abstractmethod
    def finish(self, state: SequenceState) -> Tensor:
        """[width] fp32, after the last ``take`` of a prompt."""


class ModelRunner(ABC):
    """Turns a StepPlan into a BatchPlan, runs it, samples or pools."""

    pooling: Pooling | None = None
    """What prompts are pooled to; None where it generates."""

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        """Have the program compile for every shape that steps will have, before the cache is
        sized. Called once, after ``ModelProgram.prepare``."""

    @abstractmethod
    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        """Allocate the KV cache. Called once, after the weights are loaded."""

    @abstractmethod
    def warm_up(self) -> None:
        """Run every shape once, the sampler too. Programs compiled from here on are counted in
        ``StepResult.num_compiles``."""

    @abstractmethod
    def execute(self, step: StepInput) -> StepResult:
        """One step. Hidden states come from the stage before, and go to the next one in the result.
        On ranks other than 0 and on stages before the last the result's lists are empty."""

    def close(self) -> None: ...


class Worker(ABC):
    """One rank: loads the weights, compiles, allocates the cache, executes steps. Calls come in
    this order: the cache is sized when nothing else will take memory.

    An executor calls what is declared ``@remote`` and nothing else. A subclass may declare methods
    of its own, which ``Executor.collective`` calls. RequestError refuses a call and leaves the
    worker as it is; any other error ends a worker that has a process of its own."""

    @remote
    @abstractmethod
    def load(self) -> WorkerReport:
        """Load the weights. The number of blocks is not known yet: 0."""

    @remote
    @abstractmethod
    def prepare(self, groups: list[KvGroup]) -> CacheSize:
        """Compile for these groups, which are those of all stages, and for the shapes of steps ->
        how many blocks fit then."""

    @remote
    @abstractmethod
    def allocate(self, num_blocks: int) -> WarmUp | None:
        """Allocate the agreed number of blocks (the minimum over ranks) and warm up -> what that
        and ``prepare`` took; None where it is not measured. Raises ConfigError where the warm-up
        took memory that the cache was promised."""

    @remote
    @abstractmethod
    def execute(self, step: StepInput) -> StepResult:
        """One step, as ``ModelRunner.execute``."""

    def close(self) -> None: ...
