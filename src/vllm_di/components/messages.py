"""Values that cross a process boundary: plain msgspec structs, encoded as MessagePack, never
pickled.

Three conversations use them, in the order in which a request meets them:

    frontend ─ EngineRequest ─▶ engine ─ StepPlan ─▶ workers ─ StepResult ─▶ engine
    engine ─ EngineOutputs ─▶ frontend

The frontend is the API process or the ``LLM`` class. It speaks text; everything behind it speaks
token ids.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
from msgspec.structs import force_setattr

from vllm_di.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
"""Most alternatives that a client may ask for at each position (OpenAI's limit for
``top_logprobs``)."""


RANGES: dict[str, tuple[float, float]] = {
    "n": (1, 128),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),  # fp32 logits are divided by it and must stay finite
    "min_tokens": (0, 2**31 - 1),
    "max_tokens": (1, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
"""Lowest and highest value of sampling parameters. ``top_p`` is above its lowest."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen and when a sequence ends. Names and defaults are vLLM's.

    ``__post_init__`` refuses values outside their range with a ``RequestError`` that names the
    field.
    """

    n: int = 1
    temperature: float = 1.0
    """0 is greedy: the argmax, the lowest id on a tie."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 means all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    """Token id to a value in [-100, 100] that is added to its logit."""
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    """None means up to the model's context."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Alternatives to report for each sampled token; 0 reports the sampled token alone."""
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    skip_special_tokens: bool = True
    structured_output: dict[str, Any] | None = None
    """A request for JSON, regex or grammar output, as the client sent it; None for free text."""

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None:
                _in_range(name, value, low, high, open_low=name == "top_p")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})",
                param="min_tokens",
            )
        if len(self.stop) > 16 or any(not s for s in self.stop):
            raise RequestError("stop: at most 16 strings, none of them empty", param="stop")
        for token, bias in (self.logit_bias or {}).items():
            if not -100.0 <= bias <= 100.0:
                _in_range(f"logit_bias[{token}]", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids must not be empty", param="allowed_token_ids")
        if any(not word.strip() for word in self.bad_words):
            raise RequestError("bad_words must not hold an empty string", param="bad_words")

    @property
    def greedy(self) -> bool:
        """Below 1e-5 a temperature is taken as 0, as vLLM does: dividing by it would overflow."""
        return self.temperature < 1e-5


def _in_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse NaN, infinities and values outside [low, high] (or (low, high] with ``open_low``)."""
    if not math.isfinite(value) or value < low or value > high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise RequestError(
            f"{name} must be in {bracket}{low}, {high}], got {value}", param=name.split("[")[0]
        )


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate. A client's ``n`` has become n of these before it gets here."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    bad_words_token_ids: list[list[int]] = []
    """``params.bad_words`` in token ids, each with and without a leading space."""
    priority: int = 0
    """Lower runs first under the ``priority`` policy."""
    arrival_time: float = 0.0
    """Seconds since the epoch."""
    cache_salt: str | None = None
    """Prefix-cache blocks are shared only among requests with the same salt."""
    generated_token_ids: list[int] = []
    """Tokens of its answer that an engine which ended has sent already: this one goes on behind
    them, as after a preemption."""
    pools: bool = False
    """Asks for one vector of the whole prompt, and for no token."""
    token_type_ids: list[int] = []
    """With ``pools``, of a pair of texts: the text that each token belongs to. Empty: all 0."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position. Entry 0 is the token that stands there, then the top ones
    in order."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Rank of entry 0 in the whole vocabulary, 1 for the most likely."""


# ------------------------------------------------------------------------------------------------
# engine -> workers


class NewSequence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker must know of a sequence before it first runs (again, after a preemption)."""

    seq_id: int
    params: SamplingParams
    token_ids: list[int]
    """The prompt, followed by tokens generated before a preemption."""
    prompt_len: int
    eos_token_ids: list[int] = []
    bad_words_token_ids: list[list[int]] = []
    token_type_ids: list[int] = []
    """As in EngineRequest."""
    same_as: int = -1
    """On its way to another process: the place in ``StepPlan.new`` of a choice before it of the
    same request, whose prompt and lists it shares; they are left out here. A worker never sees it.
    """


class ScheduledSequence(msgspec.Struct, frozen=True, array_like=True):
    """The share of one sequence in one step: tokens [num_computed, num_computed + num_tokens) of it
    run."""

    seq_id: int
    num_computed: int
    num_tokens: int
    new_blocks: list[list[int]]
    """For each KvGroup, block ids appended to the sequence's block table before this step; -1
    stands for a block that its window has left already."""
    new_tokens: list[int]
    """Tokens chosen since the sequence's step before, to be appended to it first."""
    samples: bool
    """True when the step reaches the end of the sequence, so that its last row is sampled."""
    is_prefill: bool
    """Whether several tokens were known and not computed: a prompt, or after a preemption all. Else
    the step runs the last one chosen, and drafts."""
    draft_tokens: list[int] = []
    """Guesses of what follows, the last of ``num_tokens``: each that proves right is kept."""


class HiddenStates(msgspec.Struct, frozen=True, array_like=True):
    """What one stage of a pipeline hands to the next: [num_tokens, hidden_size] in C order."""

    num_tokens: int
    hidden_size: int
    dtype: str
    """``float32``, ``bfloat16`` or ``float16``, in the machine's byte order."""
    data: bytes


class StepPlan(msgspec.Struct, frozen=True):
    """One step for the workers. Decode rows come first, then prefill chunks; each sequence stands
    there once."""

    step: int
    new: list[NewSequence]
    scheduled: list[ScheduledSequence]
    finished: list[int]
    """Sequences that ended, were aborted or preempted since the step before: forget them."""

    def __post_init__(self) -> None:
        """Give the choices of a plan that was ``packed`` what they share: one object for all."""
        for new in self.new:
            if new.same_as >= 0:
                first = self.new[new.same_as]
                for name in _SHARED_PARAMS:
                    force_setattr(new.params, name, getattr(first.params, name))
                force_setattr(new, "token_ids", first.token_ids)
                force_setattr(new, "bad_words_token_ids", first.bad_words_token_ids)
                force_setattr(new, "same_as", -1)

    def packed(self) -> StepPlan:
        """For encoding: what the choices of one request share is in the first of them alone. They
        are known by identity: their lists are the same objects. Decoding unpacks."""
        if len(self.new) < 2:
            return self
        first_of: dict[tuple[int, ...], int] = {}
        packed: list[NewSequence] = []
        for index, new in enumerate(self.new):
            lists = [getattr(new.params, name) for name in _SHARED_PARAMS]
            parts = (new.token_ids, new.bad_words_token_ids, *lists)
            first = first_of.setdefault(tuple(id(part) if part else 0 for part in parts), index)
            packed.append(new if first == index else _without_shared(new, first))
        if len(first_of) == len(self.new):
            return self
        bare = StepPlan(self.step, [], self.scheduled, self.finished)
        bare.new.extend(packed)  # not by the constructor, which would unpack them
        return bare


_SHARED_PARAMS = (
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "stop",
    "stop_token_ids",
    "structured_output",
)
"""Fields of the sampling parameters that may be long."""


def _without_shared(new: NewSequence, first: int) -> NewSequence:
    empty: dict[str, Any] = {
        "logit_bias": None,
        "allowed_token_ids": None,
        "structured_output": None,
    }
    empty |= {"bad_words": [], "stop": [], "stop_token_ids": []}
    params = msgspec.structs.replace(new.params, **empty)
    return msgspec.structs.replace(
        new, params=params, token_ids=[], bad_words_token_ids=[], same_as=first
    )


class StepInput(msgspec.Struct, frozen=True):
    """What a worker is given to execute one step."""

    plan: StepPlan
    hidden: HiddenStates | None = None
    """From the stage before; None on the first."""


# ------------------------------------------------------------------------------------------------
# workers -> engine


class SampledTokens(msgspec.Struct, frozen=True, array_like=True):
    """What a step chose for one sequence: one token, or several where drafts proved right."""

    seq_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One for each token, where the request asked for them."""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Positions [start, start + len(positions)) of a prompt; position p describes prompt token p (p
    >= 1)."""

    seq_id: int
    start: int
    positions: list[TokenLogprobs]


class PooledVector(msgspec.Struct, frozen=True, array_like=True):
    """What a step pooled of one prompt, whose end it reached."""

    seq_id: int
    data: bytes
    """``Pooling.size`` numbers, fp32, little-endian."""


class StepResult(msgspec.Struct, frozen=True):
    step: int
    tokens: list[SampledTokens]
    prompt_logprobs: list[PromptLogprobs] = []
    failed: dict[int, str] = {}
    """seq_id to a reason, for sequences that failed alone (NaN logits, say). The others of the step
    are good."""
    refused: list[int] = []
    """Those of ``failed`` whose reason is the request's own parameters."""
    hidden: HiddenStates | None = None
    """Of a stage that is not the last: it goes to the next one, never to the engine."""
    num_compiles: int = 0
    """Programs that were compiled in this step: 0 where the warm-up had all shapes."""
    vectors: list[PooledVector] = []
    """Of a model that pools: one in place of a token."""


class KvSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one layer keeps of each token."""

    layer: int
    num_kv_heads: int
    """Heads on this rank."""
    head_size: int
    kind: Literal["full", "sliding"] = "full"
    window: int | None = None
    """Tokens a sliding layer can see, itself included."""


class KvGroup(msgspec.Struct, frozen=True):
    """Layers that share a block table: of one kind, with one window.

    The groups of a model draw their blocks from one pool. On each rank the layer at place i of one
    group shares its tensors with the layers at place i of the others, and a block belongs to one
    group at a time.
    """

    layers: list[int]
    """``KvSpec.layer`` of each, over all stages of a pipeline."""
    window: int | None = None

    def first_block(self, position: int, block_size: int) -> int:
        """The first block that a query at ``position``, or any after it, can see."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // block_size

    def most_blocks(self, num_tokens: int, chunk: int, block_size: int) -> int:
        """Blocks that a sequence of ``num_tokens`` holds at most, when a step runs up to ``chunk``
        of them."""
        whole = -(-num_tokens // block_size)
        if self.window is None:
            return whole
        # before the chunk the window, which begins inside of a block
        return min(whole, -(-(self.window - 1 + chunk) // block_size) + 1)


class KvSpan(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one KvGroup that cross from one worker to another: the first ``length`` behind
    these blocks, which are the worker's own."""

    group: int
    blocks: list[int]
    """-1: what would stand there is not written."""
    length: int


class KvPart(msgspec.Struct, frozen=True, array_like=True):
    """What one worker holds of one layer's cache."""

    layer: int
    first_head: int
    """Among the KV heads of all ranks."""
    num_heads: int
    head_size: int
    dtype: str
    """In which its values leave: ``float32``, ``bfloat16`` or ``float16``."""


class KvParcel(msgspec.Struct, frozen=True):
    """Values on their way: for each part the keys, then the values, [tokens, heads, head size] in C
    order; the tokens are those of the spans of the layer's group, one span after the other."""

    ticket: str
    """By which ``KvTransfer.take`` finds them."""
    parts: list[KvPart]


class CacheSize(msgspec.Struct, frozen=True):
    """How much KV cache fits one rank."""

    num_blocks: int
    bytes_per_block: int
    """Over the layers that share a block."""


class LimitsReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the platform cannot do, as data that the one scheduler obeys."""

    mixed_steps: bool = True
    """Prefill and decode may share a step."""
    chunked_prefill: bool = True
    max_prefill_rows: int | None = None
    """Most sequences that may prefill in one step."""
    max_batch_context: int | None = None
    """Most context tokens summed over a step's sequences."""
    null_block: bool = False
    """Block 0 is kept free for padding."""
    drafts: bool = True
    """A step may run several tokens of a decoding sequence, to check guesses."""


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """What a model that pools gives for a prompt."""

    kind: Literal["embedding", "score"] = "embedding"
    """``score``: a number, or several, that a cross-encoder's own head makes of a pair of texts."""
    size: int
    """Numbers of a vector."""
    normalized: bool = True
    """Whether a vector has the length 1."""
    dimensions: list[int] | None = None
    """Shorter sizes that the model was trained to be cut to; [] for any, None for none."""
    every_token: bool = False
    """Whether all tokens of a prompt must run: none may come from the prefix cache."""
    whole_prompts: bool = False
    """Whether a prompt must run in one step: its tokens see those behind them."""
    token_types: int = 0
    """Kinds of token by which the model tells the two texts of a pair apart; 0: it does not."""


class Peer(msgspec.Struct, frozen=True):
    """A process that another one has started."""

    name: str
    """What errors call it: ``worker 1``, ``stage 0``."""
    pid: int
    """0: on a node of a cluster, where nobody here may signal it."""
    silent: bool = False
    """Whether its heartbeat has stopped."""


class WarmUp(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker measured while it compiled and warmed up; of several workers together the
    longest time, and the sums of the rest."""

    seconds: float
    num_programs: int
    """``ModelProgram.num_compiles``: one for each shape where shapes are static."""
    program_bytes: int | None = None
    """What compiled programs, captured graphs and workspaces took, by the device's memory report,
    so that on a host what others took meanwhile counts too; None where a device has no report."""


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    """What only the device knows, told once by ``executor.start()``; cache manager and scheduler
    are built from it."""

    block_size: int
    kv_specs: list[KvSpec]
    limits: LimitsReport
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    device: str
    dtype: str
    weight_bytes: int
    depth: int = 1
    """Steps that the executor keeps in flight: the scheduler shares sequences out over them."""
    prefill_depth: int = 0
    """Steps of prompts alone that the executor runs beside a step of decodes, on other workers; 0:
    prompts and decodes share workers."""
    num_blocks: int = 0
    """Shared by all groups; 0 until the cache is sized."""
    bytes_per_block: int = 0
    """Over all ranks of one stage alike, summed over the stages."""
    kv_groups: list[KvGroup] = []
    pooling: Pooling | None = None
    """None: the model generates."""
    warm_up: WarmUp | None = None
    """Known once the cache is allocated; None also where a worker measures nothing."""
    details: dict[str, Any] = {}
    """For people: which instruction path each op runs on, fusions in force, load time."""


# ------------------------------------------------------------------------------------------------
# engine -> frontend


class TokenOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step added to one request. The last one of a request has a ``finish_reason``."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """All of the prompt's, in the first output of a request that asked for them; entry i is prompt
    token i + 1."""
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token id that ended the sequence; None for eos."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    vector: bytes | None = None
    """``PooledVector.data``, in the only output of a request that pools."""
    error: str | None = None
    error_param: str | None = None
    error_code: str | None = None
    error_status: int = 500
    queue_time: float = 0.0
    """Seconds from arrival in the engine to the first schedule; in the first output."""
    replica: int = 0
    """The engine that sent it, of several."""


class EngineStats(msgspec.Struct, kw_only=True):
    """Gauges and running totals at the end of a step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of blocks in use by live sequences, 0 to 1."""
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    """Tokens looked up, in total."""
    prefix_cache_hits: int = 0
    step_tokens: int = 0
    """Tokens that the last step ran."""
    num_steps: int = 0
    num_compiles: int = 0
    """Programs compiled since the engine is ready, in total."""
    replica: int = 0
    """The engine that they are of, of several."""


class EngineOutputs(msgspec.Struct, kw_only=True):
    outputs: list[TokenOutput]
    stats: EngineStats
