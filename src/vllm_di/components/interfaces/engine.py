"""For whoever changes scheduling: executor, KV cache manager, scheduler, drafts, engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_di.components.interfaces.device import DEFAULT_ROLE, Placement
from vllm_di.components.interfaces.worker import Worker
from vllm_di.components.messages import (
    EngineOutputs,
    EngineRequest,
    EngineStats,
    Peer,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenOutput,
    WorkerReport,
)
from vllm_di.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Errand:
    """What starts a worker on another host, as plain data."""

    function: str
    """``module:name`` of a function of three byte strings, this placement, this assembly and the
    way to the engine (``components/lines.py``), that runs the worker in the process that calls it
    until the engine hangs up."""
    placement: bytes
    assembly: bytes


@dataclass(frozen=True, slots=True)
class NodeResource:
    """What a node of a cluster must have for a worker."""

    name: str | None
    """As the cluster knows it: ``CPU``, ``GPU``, ``NPU``. None: the platform does not say."""
    place: str
    """Where that was set, for messages."""


class WorkerLauncher(ABC):
    """Given, not chosen: opens worker containers for an executor, which itself knows no
    container."""

    num_stages: int = 1
    """Stages that the model is cut into. Each wants a placement of its own."""
    roles: Sequence[str] = (DEFAULT_ROLE,)
    """Those of all workers."""
    role: str = DEFAULT_ROLE
    """Whose workers this launcher opens: the first one's, until ``for_role``."""
    is_replacement: bool = False
    """Whether the engine takes the place of one that was ready once: what its workers want was
    there, and may be again."""

    def for_role(self, role: str) -> WorkerLauncher:
        """The launcher of another role's workers. An executor of several roles hands it to one
        executor for each. Raises ConfigError, with the place, for a role that is not there."""
        raise ConfigError(f"there are no roles of workers here, so none is called {role!r}")

    @abstractmethod
    def open(self, placement: Placement) -> AbstractContextManager[Worker]:
        """A worker in this process."""

    @abstractmethod
    def command(self, placement: Placement, address: str) -> tuple[list[str], bytes]:
        """Argument list of a worker process that connects to the Unix socket ``address``, and the
        bytes to write to its standard input (the assembly)."""

    def errand(self, placement: Placement) -> Errand:
        """For executors whose workers run on other hosts. Raises ConfigError."""
        raise ConfigError("workers of this launcher run on this host alone")

    def resource(self, stage: int) -> NodeResource:
        """What the platform of a stage's worker names."""
        return NodeResource(None, self.place(stage, "platform"))

    def worker_class(self, stage: int) -> type[Worker]:
        """The class of a stage's worker, for the methods that it declares beside those of
        ``Worker``. Asked when the first of them is called. Raises ConfigError where it cannot be
        imported here."""
        return Worker

    def place(self, stage: int, key: str) -> str:
        """Where a stage's dotted key, or the class of its slot, was set and how it is called there,
        for messages."""
        return f"stages.{stage}.{key}"

    @contextmanager
    def placed(self, stage: int) -> Iterator[None]:
        """Around calls to a stage's worker: a ConfigError with a ``key`` goes on with the key's
        ``place`` before its message."""
        try:
            yield
        except ConfigError as error:
            if error.key is None:
                raise
            raise type(error)(f"{self.place(stage, error.key)}: {error}") from error


class Executor(ABC):
    """Runs steps on the workers."""

    known_roles: ClassVar[tuple[str, ...]] = (DEFAULT_ROLE,)
    """Roles of workers that it can run; the assembly refuses any other."""
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
        """Call a method that the Worker of every rank or stage declares (``@remote``), after the
        steps submitted before; results in the order of ranks or stages. The executor's
        ``step_timeout`` bounds it. Raises ConfigError for a method that one of them does not
        declare, RequestError for a wrong argument or what a worker refuses, PortError for a result
        of another type than declared."""

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

    continues: ClassVar[bool] = False
    """Whether ``add`` takes requests with ``generated_token_ids``, and goes on behind them."""

    def check(self, request: EngineRequest) -> None:
        """What of ``add`` may take long, a grammar: raises RequestError. Called from any thread
        before it."""
        return

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

    def timed(self, plan: StepPlan, seconds: float) -> None:
        """Before ``update``: the workers took ``seconds`` for the step, from when they were free
        for it. Not called for a step that compiled a program."""

    @abstractmethod
    def has_work(self) -> bool: ...

    @abstractmethod
    def stats(self) -> EngineStats: ...


@dataclass(slots=True)
class MaskTask:
    """What a sampler wants to know of one sequence before its next token is chosen."""

    place: Any
    """What ``StructuredOutput.start`` returned for it."""
    tokens: Sequence[int]
    """Generated since the task before, to be taken in first."""
    drafts: Sequence[int]
    """Guesses of what follows. They are not taken in."""
    masks: NDArray[np.uint32]
    """[1 + drafts, ceil(vocab / 32)], to be filled: bit b of word w stands for token 32 w + b, and
    is set where that token may come; row 0 is the next token, row i the one behind draft i. Rows
    behind a draft that may not come stay as they are."""
    error: str | None = None
    """Why the sequence cannot go on; to be set in place of the masks."""


class StructuredOutput(ABC):
    """Constrains tokens to a grammar. Built in the engine, for ``check``, and in each worker whose
    sampler asks for it, for the rest: its constructor takes values of its YAML alone."""

    @abstractmethod
    def check(self, params: SamplingParams) -> None:
        """Raise RequestError for a request that this component cannot honour. It may take long:
        a server calls it on a thread of its own before ``Scheduler.add``, which calls it again."""

    def start(
        self, params: SamplingParams, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> Any:
        """The beginning of the grammar of ``params.structured_output``, for one sequence; it
        belongs to this component. ``vocab_size``: columns of the logits. Called on the sampler's
        thread while the model runs. Raises RequestError."""
        raise NotImplementedError(f"{type(self).__qualname__} works out no masks of tokens")

    def fill(self, tasks: Sequence[MaskTask]) -> None:
        """Work out the masks of one step. Called on the thread of ``start``."""
        raise NotImplementedError(f"{type(self).__qualname__} works out no masks of tokens")


class Engine(ABC):
    """Scheduler and executor in a loop. Single-threaded: one thread calls everything but ``abort``
    and ``add``, which it calls between steps."""

    report: WorkerReport

    def check(self, request: EngineRequest) -> None:
        """Its scheduler's: called from any thread before ``add``, so that steps go on
        meanwhile. Raises RequestError."""
        return

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
