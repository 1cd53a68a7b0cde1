"""``POST /v1/score`` and ``/v1/rerank``: the cosine of two texts' vectors or, of a cross-encoder,
what its head says of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from vllm_di.components.messages import EngineRequest, TokenOutput
from vllm_di.errors import RequestError
from vllm_di.frontend.pooling import PoolingProcessor
from vllm_di.frontend.scoring import Pairs, Scorer, scorer_of
from vllm_di.server.pooling.endpoint import PoolingAnswer, PoolingEndpoint, options, texts_of
from vllm_di.server.protocol import PoolingRequest, RerankRequest, ScoreRequest
from vllm_di.server.service import new_id

MOST_REPEATED = 2**26
"""Characters of a text that a cross-encoder's tokenizer reads again with each of its partners: half
a minute, where 8 MiB of a body could ask for hours."""


class Scored:
    """Pairs, and the requests that score them."""

    def __init__(self, scorer: Scorer, pairs: Pairs, requests: list[EngineRequest]) -> None:
        self._scorer, self._pairs, self.requests = scorer, pairs, requests

    @classmethod
    async def start(
        cls, processor: PoolingProcessor, name: str, pairs: Pairs, request: PoolingRequest
    ) -> Scored:
        """Tokenises on a thread. Raises RequestError."""
        if processor.pooling.kind == "score":
            _check_repeated(pairs)
        scorer, chosen = scorer_of(processor), options(request)
        made = await asyncio.to_thread(lambda: scorer.requests(name, pairs, **chosen))
        return cls(scorer, pairs, made)

    def scores(self, outputs: Sequence[TokenOutput]) -> list[float]:
        """One for each pair. Raises RequestError."""
        return self._scorer.scores(outputs, self._pairs)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, in OpenAI's form."""
        count = sum(len(request.prompt_token_ids) for request in self.requests)
        return {"prompt_tokens": count, "total_tokens": count}


class Scores(PoolingEndpoint[ScoreRequest]):
    """A number for each pair."""

    kind = ScoreRequest

    async def start(self, request: ScoreRequest, processor: PoolingProcessor) -> ScoresAnswer:
        pairs = Pairs(texts_of(request.text_1, "text_1"), texts_of(request.text_2, "text_2"))
        self.check_count(len(pairs.ones), "text_1")
        self.check_count(len(pairs.others), "text_2")
        pairs.check()
        name = new_id("score")
        scored = await Scored.start(processor, name, pairs, request)
        return ScoresAnswer(name, self._service.config.name, scored)


class ScoresAnswer(PoolingAnswer):
    """In vLLM's form."""

    def __init__(self, name: str, model: str, scored: Scored) -> None:
        self.requests, self._scored = scored.requests, scored
        self._head = {"id": name, "object": "list", "created": int(time.time()), "model": model}

    def body(self, outputs: list[TokenOutput]) -> dict[str, Any]:
        scores = self._scored.scores(outputs)
        data = [{"object": "score", "index": i, "score": score} for i, score in enumerate(scores)]
        return self._head | {"data": data, "usage": self._scored.usage}


class Ranking(PoolingEndpoint[RerankRequest]):
    """Documents in the order in which they answer a query."""

    kind = RerankRequest

    async def start(self, request: RerankRequest, processor: PoolingProcessor) -> RankingAnswer:
        self.check_count(len(request.documents), "documents")
        texts = [d if isinstance(d, str) else d.text for d in request.documents]
        most = request.max_tokens_per_doc
        if most is not None and most < 1:
            raise RequestError(
                f"max_tokens_per_doc={most}: expected 1 or more", param="max_tokens_per_doc"
            )
        name = new_id("rerank")
        pairs = Pairs([request.query], texts, "query", "documents", most)
        scored = await Scored.start(processor, name, pairs, request)
        return RankingAnswer(name, self._service.config.name, request, texts, scored)


class RankingAnswer(PoolingAnswer):
    """In the form that vLLM's answers have, and that the clients of Jina and Cohere read."""

    def __init__(
        self, name: str, model: str, request: RerankRequest, texts: Sequence[str], scored: Scored
    ) -> None:
        self.requests, self._texts, self._scored = scored.requests, texts, scored
        self._head = {"id": name, "model": model}
        self._top = request.top_n or len(texts)
        self._with_texts = request.return_documents is not False

    def body(self, outputs: list[TokenOutput]) -> dict[str, Any]:
        scores = self._scored.scores(outputs)
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        results: list[dict[str, Any]] = []
        for index in order[: self._top]:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if self._with_texts:
                result["document"] = {"text": self._texts[index]}
            results.append(result)
        return self._head | {"usage": self._scored.usage, "results": results}


def _check_repeated(pairs: Pairs) -> None:
    if len(pairs.ones) > 1:
        return
    count, num_others = sum(map(len, pairs.ones)), len(pairs.others)
    if count * num_others > MOST_REPEATED:
        raise RequestError(
            f"{pairs.param_one}: a cross-encoder reads its {count} characters with each of "
            f"{num_others} texts; expected {MOST_REPEATED // num_others} at most with so many",
            param=pairs.param_one,
        )
