"""The results of the ``LLM`` class, in vLLM's form."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_di.components.interfaces import Tokenizer
from vllm_di.components.messages import FinishReason, TokenLogprobs


@dataclass(slots=True)
class Logprob:
    """One candidate token at one position. ``rank`` is 1 for the most likely token of the
    vocabulary."""

    logprob: float
    rank: int | None
    decoded_token: str


LogprobsOfPosition = dict[int, Logprob]
"""Token id to Logprob: the chosen token first, then the most likely ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` choices of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsOfPosition] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended the text; None for the EOS token."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Seconds since the epoch; ``time_in_queue`` is a duration in seconds."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    time_in_queue: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request with all its choices."""

    request_id: str
    prompt: str | None
    """None when the prompt was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[LogprobsOfPosition | None] | None = None
    """Entry 0 is None: the first token has no logprob."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""


def token_string(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of a single token; a partial character is U+FFFD."""
    return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")


def position_logprobs(tokenizer: Tokenizer, entry: TokenLogprobs) -> LogprobsOfPosition:
    """Convert from the engine's compact form. Entry 0 is the chosen token, the others follow by
    rank."""
    result: LogprobsOfPosition = {}
    for i, (token_id, logprob) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
        if token_id not in result:
            rank = i or entry.rank
            result[token_id] = Logprob(logprob, rank, token_string(tokenizer, token_id))
    return result
