"""From texts to the requests of a model that pools, and from its vectors to numbers. The server and
the ``LLM`` class both use it. No torch, no numpy."""

from __future__ import annotations

import math
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_di.components.interfaces import Tokenizer
from vllm_di.components.messages import (
    EngineRequest,
    Pooling,
    SamplingParams,
    TokenOutput,
    WorkerReport,
)
from vllm_di.errors import RequestError
from vllm_di.frontend.requests import check_token_ids, encode_prompt, failure

Text = str | Sequence[int]
"""A text, or its token ids."""


@dataclass(slots=True)
class EmbeddingOutput:
    """What a text became."""

    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """One text of ``LLM.embed``, in vLLM's form."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True


class PoolingProcessor:
    """Makes requests and reads their vectors. Holds the tokenizer and what the model gives."""

    def __init__(self, tokenizer: Tokenizer, report: WorkerReport, name: str) -> None:
        """``name``: of the model, for messages. Raises RequestError where it does not pool."""
        if report.pooling is None:
            raise RequestError(
                f"the model {name!r} generates text and makes no embeddings or scores: it was "
                "started with pooler=none, or its checkpoint says nothing of pooling (then "
                "pooler=last, mean or cls make it an embedding model)",
                param="model",
                code="pooling_off",
            )
        self.pooling: Pooling = report.pooling
        self._tokenizer, self._name = tokenizer, name
        self._max_len, self._vocab_size = report.max_model_len, report.vocab_size

    def check_embeds(self) -> None:
        """Raise RequestError where the model's results are no embeddings."""
        if self.pooling.kind != "embedding":
            raise RequestError(
                f"the model {self._name!r} is a cross-encoder: it scores pairs of texts "
                "(/v1/score, /v1/rerank) and makes no embeddings",
                param="model",
                code="pooling_off",
            )

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raise RequestError for a size to which this model's vectors must not be cut."""
        if dimensions is None or dimensions == self.pooling.size:
            return
        allowed, param = self.pooling.dimensions, "dimensions"
        if allowed is None:
            raise RequestError(
                f"dimensions={dimensions}: the model {self._name!r} was not trained for vectors "
                f"that are cut (config.json has neither is_matryoshka nor matryoshka_dimensions); "
                f"its vectors have {self.pooling.size} numbers",
                param=param,
            )
        if not 1 <= dimensions <= self.pooling.size or (allowed and dimensions not in allowed):
            some = ", ".join(map(str, allowed)) if allowed else f"1 to {self.pooling.size}"
            raise RequestError(f"dimensions={dimensions}: expected {some}", param=param)

    def request(
        self,
        request_id: str,
        text: Text,
        *,
        param: str = "input",
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> EngineRequest:
        """Raises RequestError that names ``param``. ``max_tokens``: the text is cut to so many
        tokens, special ones included; -1: to what the model can read."""
        try:
            ids = encode_prompt(self._tokenizer, text, add_special_tokens=add_special_tokens)
        except RequestError as error:
            raise RequestError(f"{param}: {error.message}", param=param) from None
        if max_tokens is not None:
            ids = self._cut(text, ids, self.limit(max_tokens))
        return self._checked(request_id, ids, [], param, priority, cache_salt)

    def pair(
        self,
        request_id: str,
        one: Text,
        other: Text,
        *,
        param: str = "input",
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        max_other: int | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> EngineRequest:
        """As ``request``, of two texts that a cross-encoder reads as one prompt; ``max_tokens`` are
        those of both. ``max_other``: the most of ``other``."""
        if not isinstance(one, str) or not isinstance(other, str):
            raise RequestError(
                f"{param}: the model {self._name!r} is a cross-encoder, and its tokenizer joins "
                "the pair: expected texts, not token ids",
                param=param,
            )
        limit = None if max_tokens is None else self.limit(max_tokens)
        tokens = self._tokenizer.encode_pair(
            one,
            other,
            add_special_tokens=add_special_tokens,
            max_tokens=limit,
            max_other=max_other,
        )
        if not tokens.token_ids:
            raise RequestError(f"{param}: both texts of a pair are empty", param=param)
        types = tokens.type_ids if self.pooling.token_types else []
        return self._checked(request_id, tokens.token_ids, types, param, priority, cache_salt)

    def _checked(
        self,
        request_id: str,
        ids: list[int],
        types: list[int],
        param: str,
        priority: int,
        cache_salt: str | None,
    ) -> EngineRequest:
        check_token_ids(ids, self._vocab_size, param)
        if len(ids) > self._max_len:
            what = "a text" if self.pooling.kind == "embedding" else "a pair of texts"
            raise RequestError(
                f"{param}: the model reads {self._max_len} tokens at most, and {what} has "
                f"{len(ids)}; shorten it, or set truncate_prompt_tokens=-1",
                param=param,
                code="context_length_exceeded",
            )
        return EngineRequest(
            request_id=request_id,
            prompt_token_ids=ids,
            params=SamplingParams(temperature=0.0, max_tokens=1),
            priority=priority,
            arrival_time=time.time(),
            cache_salt=cache_salt,
            pools=True,
            token_type_ids=types,
        )

    def limit(self, max_tokens: int) -> int:
        """Of ``truncate_prompt_tokens``. Raises RequestError."""
        if max_tokens == -1:
            return self._max_len
        if not 1 <= max_tokens <= self._max_len:
            raise RequestError(
                f"truncate_prompt_tokens={max_tokens}: expected -1, or 1 to {self._max_len}",
                param="truncate_prompt_tokens",
            )
        return max_tokens

    def _cut(self, text: Text, ids: list[int], limit: int) -> list[int]:
        """The first tokens of a text, between the special tokens that it had; ids that a client
        sent are cut as they are."""
        if len(ids) <= limit or not isinstance(text, str):
            return ids[:limit]
        plain = self._tokenizer.encode(text, add_special_tokens=False)
        room = limit - (len(ids) - len(plain))
        for start in range(len(ids) - len(plain) + 1):
            end = start + len(plain)
            if ids[start:end] == plain and room > 0:
                return [*ids[:start], *plain[:room], *ids[end:]]
        raise RequestError(
            f"truncate_prompt_tokens={limit} leaves no room between the special tokens of a text",
            param="truncate_prompt_tokens",
        )

    def vector(self, output: TokenOutput, dimensions: int | None = None) -> array[float]:
        """A request's numbers, cut to ``dimensions`` and then again of length 1 where they were.
        Raises RequestError where the engine failed."""
        if output.error is not None:
            raise failure(output)
        if output.vector is None:
            raise RequestError("the engine gave no vector", status=500)
        numbers = array("f", output.vector)
        if sys.byteorder == "big":
            numbers.byteswap()
        if dimensions is None or dimensions == len(numbers):
            return numbers
        numbers = numbers[:dimensions]
        if self.pooling.normalized:
            length = math.sqrt(math.fsum(x * x for x in numbers)) or 1.0
            numbers = array("f", [x / length for x in numbers])
        return numbers
