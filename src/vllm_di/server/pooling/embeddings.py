"""``POST /v1/embeddings``."""

from __future__ import annotations

import asyncio
import sys
import time
from array import array
from base64 import b64encode
from typing import Any

from vllm_di.components.messages import EngineRequest, TokenOutput
from vllm_di.frontend.pooling import PoolingProcessor
from vllm_di.server.pooling.endpoint import PoolingAnswer, PoolingEndpoint, options, texts_of
from vllm_di.server.protocol import EmbeddingRequest
from vllm_di.server.service import new_id


class Embeddings(PoolingEndpoint[EmbeddingRequest]):
    """A vector for each text."""

    kind = EmbeddingRequest

    async def start(
        self, request: EmbeddingRequest, processor: PoolingProcessor
    ) -> EmbeddingsAnswer:
        processor.check_embeds()
        processor.check_dimensions(request.dimensions)
        texts = texts_of(request.input, "input")
        self.check_count(len(texts), "input")
        name, chosen = new_id("embd"), options(request)

        def tokenise() -> list[EngineRequest]:
            return [
                processor.request(f"{name}-{index}", text, **chosen)
                for index, text in enumerate(texts)
            ]

        requests = await asyncio.to_thread(tokenise)
        return EmbeddingsAnswer(name, self._service.config.name, request, processor, requests)


class EmbeddingsAnswer(PoolingAnswer):
    """In OpenAI's form."""

    def __init__(
        self,
        name: str,
        model: str,
        request: EmbeddingRequest,
        processor: PoolingProcessor,
        requests: list[EngineRequest],
    ) -> None:
        self.requests = requests
        self._head = {"id": name, "object": "list", "created": int(time.time()), "model": model}
        self._processor, self._dimensions = processor, request.dimensions
        self._is_base64 = request.encoding_format == "base64"

    def body(self, outputs: list[TokenOutput]) -> dict[str, Any]:
        vectors = [self._processor.vector(output, self._dimensions) for output in outputs]
        encode = base64_of if self._is_base64 else list
        data = [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(vectors)
        ]
        count = sum(len(request.prompt_token_ids) for request in self.requests)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return self._head | {"data": data, "usage": usage}


def base64_of(vector: array[float]) -> str:
    """Of fp32, little-endian: OpenAI's ``encoding_format=base64``."""
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return b64encode(vector.tobytes()).decode()
