"""langchain-openai: embeddings of documents and of a query, sync and async."""

from __future__ import annotations

import asyncio

from common import POOLED, is_unit
from langchain_openai import OpenAIEmbeddings


def embeddings(url: str) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(
        model=POOLED,
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        check_embedding_ctx_length=False,  # else it sends token ids of an OpenAI model
    )


def check_embeddings(url: str) -> None:
    first, second = embeddings(url).embed_documents(["hello", "a longer text"])
    assert is_unit(first)
    assert first != second
    query = embeddings(url).embed_query("hello")
    assert all(abs(x - y) < 1e-6 for x, y in zip(first, query, strict=True))


def check_async(url: str) -> None:
    assert is_unit(asyncio.run(embeddings(url).aembed_query("hello")))
