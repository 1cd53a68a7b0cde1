"""``POST /v1/score`` and ``/v1/rerank``: the cosine of two texts' vectors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from vllm_di.components.messages import EngineRequest, TokenOutput
from vllm_di.errors import RequestError
from vllm_di.frontend.pooling import PoolingProcessor, cosine
from vllm_di.server.pooling.endpoint import PoolingAnswer, PoolingEndpoint, options, texts_of
from vllm_di.server.protocol import RerankRequest, ScoreRequest
from vllm_di.server.service import new_id


class Scores(PoolingEndpoint[ScoreRequest]):
    """A number for each pair."""

    kind = ScoreRequest

    async def start(self, request: ScoreRequest, processor: PoolingProcessor) -> ScoresAnswer:
        processor.check_embeds()
        ones, others = texts_of(request.text_1, "text_1"), texts_of(request.text_2, "text_2")
        self.check_count(len(ones), "text_1")
        self.check_count(len(others), "text_2")
        check_pairs(len(ones), len(others))
        name, chosen = new_id("score"), options(request)

        def tokenise() -> list[EngineRequest]:
            return [
                processor.request(f"{name}-{param}-{index}", text, param=param, **chosen)
                for param, texts in (("text_1", ones), ("text_2", others))
                for index, text in enumerate(texts)
            ]

        requests = await asyncio.to_thread(tokenise)
        return ScoresAnswer(name, self._service.config.name, len(ones), processor, requests)


class ScoresAnswer(PoolingAnswer):
    """In vLLM's form."""

    def __init__(
        self,
        name: str,
        model: str,
        num_ones: int,
        processor: PoolingProcessor,
        requests: list[EngineRequest],
    ) -> None:
        """The first ``num_ones`` of ``requests`` are one side of the pairs."""
        self.requests, self._num_ones, self._processor = requests, num_ones, processor
        self._head = {"id": name, "object": "list", "created": int(time.time()), "model": model}

    def body(self, outputs: list[TokenOutput]) -> dict[str, Any]:
        scores = scores_of(self._processor, outputs, self._num_ones)
        data = [{"object": "score", "index": i, "score": score} for i, score in enumerate(scores)]
        return self._head | {"data": data, "usage": usage_of(self.requests)}


class Ranking(PoolingEndpoint[RerankRequest]):
    """Documents in the order in which they answer a query."""

    kind = RerankRequest

    async def start(self, request: RerankRequest, processor: PoolingProcessor) -> RankingAnswer:
        processor.check_embeds()
        self.check_count(len(request.documents), "documents")
        texts = [d if isinstance(d, str) else d.text for d in request.documents]
        name, chosen = new_id("rerank"), options(request)
        of_document = dict(chosen)
        if request.max_tokens_per_doc is not None:
            if request.max_tokens_per_doc < 1:
                raise RequestError(
                    f"max_tokens_per_doc={request.max_tokens_per_doc}: expected 1 or more",
                    param="max_tokens_per_doc",
                )
            most = min(request.max_tokens_per_doc, processor.limit(-1))
            given = request.truncate_prompt_tokens
            of_document["max_tokens"] = most if given is None else min(most, processor.limit(given))

        def tokenise() -> list[EngineRequest]:
            query = processor.request(f"{name}-query", request.query, param="query", **chosen)
            return [
                query,
                *(
                    processor.request(f"{name}-{index}", text, param="documents", **of_document)
                    for index, text in enumerate(texts)
                ),
            ]

        requests = await asyncio.to_thread(tokenise)
        return RankingAnswer(name, self._service.config.name, request, texts, processor, requests)


class RankingAnswer(PoolingAnswer):
    """In the form that vLLM's answers have, and that the clients of Jina and Cohere read."""

    def __init__(
        self,
        name: str,
        model: str,
        request: RerankRequest,
        texts: Sequence[str],
        processor: PoolingProcessor,
        requests: list[EngineRequest],
    ) -> None:
        self.requests, self._texts, self._processor = requests, texts, processor
        self._head = {"id": name, "model": model}
        self._top = request.top_n or len(texts)
        self._with_texts = request.return_documents is not False

    def body(self, outputs: list[TokenOutput]) -> dict[str, Any]:
        scores = scores_of(self._processor, outputs, 1)
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        results: list[dict[str, Any]] = []
        for index in order[: self._top]:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if self._with_texts:
                result["document"] = {"text": self._texts[index]}
            results.append(result)
        return self._head | {"usage": usage_of(self.requests), "results": results}


def check_pairs(num_ones: int, num_others: int) -> None:
    """Raise RequestError unless each text has a partner, or one is the partner of all."""
    if num_ones not in (1, num_others):
        raise RequestError(
            f"text_1 has {num_ones} texts and text_2 {num_others}: expected as many, or one",
            param="text_1",
        )


def scores_of(
    processor: PoolingProcessor, outputs: Sequence[TokenOutput], num_ones: int
) -> list[float]:
    """The first ``num_ones`` outputs with those behind them; a single one with each of them."""
    vectors = [processor.vector(output) for output in outputs]
    ones, others = vectors[:num_ones], vectors[num_ones:]
    if len(ones) == 1:
        ones = ones * len(others)
    return [cosine(one, other) for one, other in zip(ones, others, strict=True)]


def usage_of(requests: Sequence[EngineRequest]) -> dict[str, int]:
    """Tokens, in OpenAI's form."""
    count = sum(len(request.prompt_token_ids) for request in requests)
    return {"prompt_tokens": count, "total_tokens": count}
