"""For whoever changes what a client sees: tokenizer, templates, parsers, metrics, server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from vllm_di.components.messages import (
    EngineRequest,
    EngineStats,
    SamplingParams,
    TokenOutput,
    WorkerReport,
)
from vllm_di.errors import RequestError


class PairTokens(NamedTuple):
    """A pair of texts as one prompt."""

    token_ids: list[int]
    type_ids: list[int]
    """Of each token the text that it belongs to, 0 or 1, by the tokenizer's template."""


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocab_size: int
    eos_token_id: int | None
    bos_token: str | None
    eos_token: str | None
    is_byte_level: bool = False
    """Whether ``decode`` gives the ``token_bytes`` of its ids, put together and read as UTF-8, with
    U+FFFD for what is none: then text is made token by token, without it."""

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def encode_pair(
        self,
        one: str,
        other: str,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        max_other: int | None = None,
    ) -> PairTokens:
        """Two texts in one prompt, as a cross-encoder was trained to read them. ``max_tokens``:
        both are cut, the longer one first, so that there are at most so many tokens, special ones
        included; ``max_other``: the most of ``other``. Raises RequestError where that leaves no
        room for a text."""
        raise RequestError(
            f"{type(self).__name__} has no encode_pair(), and joins no pairs of texts", status=501
        )

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

    def info(self) -> Mapping[str, Any]:
        """Plain values for clients that tokenise by themselves, by the names of
        ``tokenizer_config.json``; no paths."""
        return {}


class ChatTemplate(ABC):
    """Messages to a prompt."""

    source: str | None = None
    """The template in Jinja, for clients that render by themselves; None where there is none."""

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
    def start(self, request: ParserRequest) -> ParserState | None:
        """A state for one choice; None where all of its text is content as it stands. Called only
        for requests with ``tools`` whose ``tool_choice`` is not ``none``; the state is fed with
        what the reasoning parser left as content. Its events are content and tool calls."""


@dataclass(frozen=True, slots=True)
class ThoughtMarks:
    """The texts round the reasoning of one answer."""

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    """Of each kind at least one. The first is the one to write."""
    begins: Literal["inside", "before", "behind"]
    """Where the answer begins: inside of reasoning, before some that may come, or behind."""


class ReasoningParser(ABC):
    """Separates the reasoning from the answer."""

    needs_special_tokens: ClassVar[bool] = False
    """As for tool parsers."""

    @abstractmethod
    def check(self, request: Mapping[str, Any]) -> None:
        """Raise RequestError (code ``unsupported_parameter``) for a request that needs what this
        parser lacks."""

    @abstractmethod
    def start(self, request: ParserRequest) -> ParserState | None:
        """A state for one choice, whose events are reasoning and content; None where all of its
        text is content as it stands."""

    def marks(self, request: ParserRequest) -> ThoughtMarks | None:
        """With them a thinking budget can close the reasoning, and a grammar begins behind it;
        ``start`` reads the same marks. None: such a budget is refused, and an answer with a
        grammar has no reasoning."""
        return None


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

    def of(self, replica: int) -> Metrics:
        """Where ``tokens``, ``finished``, ``engine`` and ``info`` of one replica of the engine go;
        all to one place by default."""
        return self

    @abstractmethod
    def http(self, handler: str, status: int, seconds: float) -> None: ...

    @abstractmethod
    def info(self, report: WorkerReport, labels: Mapping[str, str]) -> None:
        """Static facts, once, when the engine is ready; ``labels`` are slot -> class name."""

    @abstractmethod
    def render(self) -> tuple[bytes, str]:
        """(body, content type) in Prometheus' text form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRequest:
    """One HTTP request that has ended, for a span. Nothing here is text of a prompt or an
    answer."""

    method: str
    route: str
    """The path's template: ``/v1/chat/completions``, ``/v1/responses/{id}``."""
    operation: Literal["chat", "text_completion", "embeddings"] | None
    """What OpenTelemetry calls it; None for what it has no name for."""
    model: str
    """As clients call it."""
    request_id: str
    """The answer's ``X-Request-Id``."""
    response_id: str | None
    """The answer's own id, by which the engine's log calls it."""
    status: int
    """Of HTTP; 499 where the client closed the connection first."""
    error: str | None
    """The code of the error that ended it; of one within a stream, too."""
    started: float
    """Seconds since the epoch, as ``ended``."""
    ended: float
    headers: Mapping[str, str]
    """``traceparent`` and ``tracestate``, where the client sent them; not checked."""
    params: SamplingParams | None
    """None where nothing was generated."""
    choices: Sequence[RequestTimes]
    """Of each choice of each prompt, or of each text that was pooled; none where the request did
    not get so far."""


class Tracing(ABC):
    """Sends spans of requests to whatever collects them."""

    records: ClassVar[bool] = True
    """Whether ``record`` is called at all."""

    @abstractmethod
    def record(self, request: TracedRequest) -> None:
        """Called in the event loop, once for each request that has ended, and must not wait: what
        cannot be sent at once is queued or dropped. What it raises is logged, and no request
        fails."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What one replica of the engine has to do at the moment, as the API process knows it."""

    replica: int
    """Its number, from 0."""
    num_requests: int
    """Sent and not yet ended: running or waiting."""
    num_tokens: int
    """Of these requests: prompts and answers so far."""


class Router(ABC):
    """Chooses the replica of each request, where ``executor.data_parallel_size`` is above 1.
    Called in the event loop: a call that takes long holds up every stream."""

    @abstractmethod
    def choose(self, request: EngineRequest, loads: Sequence[ReplicaLoad]) -> int:
        """The ``replica`` of one of ``loads``, which are those that take requests: never none. The
        request is then sent there."""

    def forget(self, replica: int) -> None:
        """The replica has ended: what it held in its cache is lost, and a new one has nothing."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One of the engines behind an EngineClient, as it is now."""

    state: Literal["starting", "ready", "draining", "unresponsive", "dead"]
    stage: str
    failure: str | None
    report: WorkerReport | None
    load: ReplicaLoad


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

    def replicas(self) -> Sequence[Replica]:
        """The engines behind this client; none where it is the client of one."""
        return ()

    def reports(self) -> Sequence[WorkerReport]:
        """Of each engine, by its number; of one that is not ready ``report`` stands."""
        return () if self.report is None else (self.report,)

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
