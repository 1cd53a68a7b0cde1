"""openai: embeddings, in base64 (its default) and as floats, sync and async."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from common import POOLED, is_unit

TEXTS = ["hello", "a longer text", "hello"]


def check_embeddings(url: str) -> None:
    one = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    packed = one.embeddings.create(model=POOLED, input=TEXTS)
    plain = one.embeddings.create(model=POOLED, input=TEXTS, encoding_format="float")
    for a, b in zip(packed.data, plain.data, strict=True):
        assert is_unit(a.embedding)
        assert all(abs(x - y) < 1e-6 for x, y in zip(a.embedding, b.embedding, strict=True))
    assert packed.data[0].embedding == packed.data[2].embedding
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0


def check_async(url: str) -> None:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as one:
            return await one.embeddings.create(model=POOLED, input="hello")

    assert is_unit(asyncio.run(ask()).data[0].embedding)


def check_scores(url: str) -> None:
    """Of vLLM's endpoints, for which the client has a plain ``post``."""
    one = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    body = {"model": POOLED, "text_1": "hello", "text_2": TEXTS}
    found: Any = one.post("/score", body=body, cast_to=object)
    scores = [entry["score"] for entry in found["data"]]
    assert abs(scores[0] - 1) < 1e-5 and scores[1] < scores[0]


def check_errors(url: str) -> None:
    one = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    try:
        one.chat.completions.create(model=POOLED, messages=[{"role": "user", "content": "a"}])
    except openai.BadRequestError as error:
        assert "generates no text" in str(error)
    else:
        raise AssertionError("a model that pools has answered")
