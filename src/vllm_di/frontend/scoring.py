"""Scores of pairs of texts: the cosine of their vectors or, of a cross-encoder, what its head says
of both. The server and the ``LLM`` class both use it. No torch, no numpy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_di.components.messages import EngineRequest, TokenOutput
from vllm_di.errors import RequestError
from vllm_di.frontend.pooling import PoolingProcessor, Text


@dataclass(slots=True)
class ScoringOutput:
    """How well two texts go together."""

    score: float


@dataclass(slots=True)
class ScoringRequestOutput:
    """One pair of ``LLM.score``, in vLLM's form."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: ScoringOutput
    finished: bool = True


class Pairs(NamedTuple):
    """Texts to be scored in pairs, and the fields of a request that they came in. A single text of
    ``ones`` goes with each of ``others``."""

    ones: Sequence[Text]
    others: Sequence[Text]
    param_one: str = "text_1"
    param_other: str = "text_2"
    max_other: int | None = None
    """Most tokens of one of ``others``."""

    def check(self) -> None:
        """Raise RequestError unless each text has a partner, or one is the partner of all."""
        if len(self.ones) not in (1, len(self.others)):
            raise RequestError(
                f"{self.param_one} has {len(self.ones)} texts and {self.param_other} "
                f"{len(self.others)}: expected as many, or one",
                param=self.param_one,
            )


class Scorer(ABC):
    """From pairs of texts to the requests that score them, and from their outputs to numbers."""

    def __init__(self, processor: PoolingProcessor) -> None:
        self._processor = processor

    @abstractmethod
    def requests(self, name: str, pairs: Pairs, **options: Any) -> list[EngineRequest]:
        """Their ids begin with ``name``; the last ones are those of the pairs, in order. Further
        ``options`` are those of ``PoolingProcessor.request``. Raises RequestError."""

    @abstractmethod
    def scores(self, outputs: Sequence[TokenOutput], pairs: Pairs) -> list[float]:
        """One for each pair; ``outputs`` are in the order of ``requests``. Raises RequestError."""


class Cosines(Scorer):
    """Of an embedding model: each text becomes a vector."""

    def requests(self, name: str, pairs: Pairs, **options: Any) -> list[EngineRequest]:
        of_other = dict(options)
        if pairs.max_other is not None:
            limit = self._processor.limit
            most, asked = min(pairs.max_other, limit(-1)), options.get("max_tokens")
            of_other["max_tokens"] = most if asked is None else min(most, limit(asked))
        texts = [(text, pairs.param_one, options) for text in pairs.ones]
        texts += [(text, pairs.param_other, of_other) for text in pairs.others]
        return [
            self._processor.request(f"{name}-{index}", text, param=param, **chosen)
            for index, (text, param, chosen) in enumerate(texts)
        ]

    def scores(self, outputs: Sequence[TokenOutput], pairs: Pairs) -> list[float]:
        vectors = [self._processor.vector(output) for output in outputs]
        ones, others = vectors[: len(pairs.ones)], vectors[len(pairs.ones) :]
        if len(ones) == 1:
            ones = ones * len(others)
        return [cosine(one, other) for one, other in zip(ones, others, strict=True)]


class CrossEncoder(Scorer):
    """Each pair becomes one prompt."""

    def requests(self, name: str, pairs: Pairs, **options: Any) -> list[EngineRequest]:
        ones = pairs.ones if len(pairs.ones) > 1 else [*pairs.ones] * len(pairs.others)
        return [
            self._processor.pair(
                f"{name}-{index}",
                one,
                other,
                param=pairs.param_other,
                max_other=pairs.max_other,
                **options,
            )
            for index, (one, other) in enumerate(zip(ones, pairs.others, strict=True))
        ]

    def scores(self, outputs: Sequence[TokenOutput], pairs: Pairs) -> list[float]:
        return [self._processor.vector(output)[0] for output in outputs]


def scorer_of(processor: PoolingProcessor) -> Scorer:
    """The one that suits the model."""
    scores_pairs = processor.pooling.kind == "score"
    return CrossEncoder(processor) if scores_pairs else Cosines(processor)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two vectors of one size; 0 where one has no length."""
    lengths = math.sqrt(math.fsum(x * x for x in one) * math.fsum(x * x for x in other))
    return math.fsum(map(float.__mul__, one, other)) / lengths if lengths else 0.0
