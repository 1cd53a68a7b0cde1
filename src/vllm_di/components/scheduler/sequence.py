"""What the scheduler keeps of one request."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_di.components.interfaces import Prefix
from vllm_di.components.messages import EngineRequest, FinishReason, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: waiting, running, or preempted (waiting again with its tokens)."""

    seq_id: int
    request: EngineRequest
    arrival: int
    """Order of arrival, which breaks ties."""
    max_tokens: int
    eos_ids: frozenset[int]
    queued_at: float
    token_ids: list[int]
    """Prompt and generated tokens. Until it first runs this is the request's own list, which other
    choices share."""
    prefix: Prefix
    stop_ids: frozenset[int] = frozenset()
    """Made when it first runs."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache, counting a step in flight."""
    num_cached: int = -1
    """Prompt tokens found in the prefix cache at the first schedule; -1 before it."""
    known_to_workers: bool = False
    unsent_tokens: list[int] = field(default_factory=list)
    """Sampled, but not yet told to the workers."""
    unsent_blocks: list[list[int]] = field(default_factory=list)
    """Of each KvGroup, allocated but not yet told to the workers."""
    queue_time: float = 0.0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    reported: bool = False
    """True once an output was sent."""

    def begin(self) -> None:
        """Before it first runs: lists of its own."""
        if self.num_cached < 0:
            self.token_ids = list(self.token_ids)
            self.prefix.token_ids = self.token_ids
            self.stop_ids = frozenset(self.request.params.stop_token_ids)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def is_decoding(self) -> bool:
        """Whether a token at most is left to run, now or once the step in flight is done."""
        return len(self.token_ids) - self.num_computed <= 1

    @property
    def rank(self) -> tuple[int, int]:
        """Order under the priority policy: lower first."""
        return self.request.priority, self.arrival

    def finish_reason(
        self, token: int, max_model_len: int
    ) -> tuple[FinishReason | None, int | None]:
        """(reason, stop id) after ``token`` was appended; the stop id is None for end of
        sequence."""
        params, num_tokens = self.request.params, len(self.token_ids)
        num_generated = num_tokens - len(self.request.prompt_token_ids)
        if num_generated >= params.min_tokens:
            if token in self.eos_ids and not params.ignore_eos:
                return "stop", None
            if token in self.stop_ids:
                return "stop", token
        if num_generated >= self.max_tokens or num_tokens >= max_model_len:
            return "length", None
        return None, None
