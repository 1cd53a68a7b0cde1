"""What an answer to a client is made of: updates in, bytes or a body out."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import orjson

from vllm_di.components.interfaces import Tokenizer
from vllm_di.components.messages import TokenLogprobs
from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Update
from vllm_di.server.errors import openai_error
from vllm_di.server.protocol import GenerateRequest

_DONE = b"data: [DONE]\n\n"


class Answer(ABC):
    """Renders the updates of one request, as events or as one body."""

    @abstractmethod
    def events(self, position: int, update: Update) -> bytes:
        """The events of one update of the prompt at ``position``; empty when there is nothing to
        show."""

    @abstractmethod
    def add(self, position: int, update: Update) -> None:
        """Keep one update for ``body``."""

    @abstractmethod
    def closing_events(self) -> bytes:
        """What comes after the last update."""

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The whole answer."""

    @abstractmethod
    def error_event(self, error: RequestError) -> bytes:
        """The last event of a stream that fails."""


class OpenAiAnswer(Answer):
    """In OpenAI's form. What does not change between events is encoded once."""

    OBJECT: ClassVar[str]
    EVENT_OBJECT: ClassVar[str]

    def __init__(
        self,
        request: GenerateRequest,
        *,
        request_id: str,
        model: str,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
    ) -> None:
        options = request.stream_options
        self._wants_usage = bool(options and options.include_usage)
        self._usage_in_each = self._wants_usage and bool(options and options.continuous_usage_stats)
        self._with_token_ids = bool(request.return_token_ids)
        self._tokenizer = tokenizer
        self._prompts = prompts
        """Token ids of each prompt; the position of an update is that of its prompt."""
        self._prompt_logprobs: list[list[TokenLogprobs] | None] = [None] * len(prompts)
        self._num_cached = [0] * len(prompts)
        self._num_generated = 0
        head: dict[str, Any] = {"id": request_id, "object": self.OBJECT}
        self._head = head | {"created": int(time.time()), "model": model}
        event_head = orjson.dumps(self._head | {"object": self.EVENT_OBJECT})
        self._event_head = b"data: " + event_head[:-1] + b',"choices":['
        self._event_end = b'],"usage":null}\n\n' if self._wants_usage else b"]}\n\n"

    @abstractmethod
    def choices(self) -> list[dict[str, Any]]:
        """``choices`` of the body."""

    def closing_events(self) -> bytes:
        if not self._wants_usage:
            return _DONE
        return self._event_head + b'],"usage":' + orjson.dumps(self._usage()) + b"}\n\n" + _DONE

    def error_event(self, error: RequestError) -> bytes:
        return b"data: " + openai_error(error) + b"\n\n"

    def body(self) -> dict[str, Any]:
        return self._head | {"choices": self.choices(), "usage": self._usage()}

    def _note(self, position: int, update: Update) -> None:
        """Keep what the answer says of its prompts and of their usage."""
        self._num_generated += len(update.token_ids)
        if update.num_cached_tokens:
            cached = max(self._num_cached[position], update.num_cached_tokens)
            self._num_cached[position] = cached
        if update.prompt_logprobs is not None:
            self._prompt_logprobs[position] = update.prompt_logprobs

    def _usage(self) -> dict[str, Any]:
        """Tokens so far, in OpenAI's form."""
        prompt = sum(map(len, self._prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._num_generated,
            "total_tokens": prompt + self._num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached)},
        }

    def _event(self, choice: bytes) -> bytes:
        """The event of one choice."""
        if self._usage_in_each:
            end = b'],"usage":' + orjson.dumps(self._usage()) + b"}\n\n"
        else:
            end = self._event_end
        return self._event_head + choice + end
