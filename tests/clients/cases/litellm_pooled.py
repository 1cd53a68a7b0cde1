"""litellm: embeddings and rankings, as an OpenAI server and as vLLM."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm
from common import POOLED, is_unit


def check_embeddings(url: str) -> None:
    for provider in ("openai", "hosted_vllm"):
        answer = litellm.embedding(
            model=f"{provider}/{POOLED}",
            api_base=f"{url}/v1",
            api_key="none",
            input=["hello", "a longer text"],
        )
        assert is_unit(answer.data[0]["embedding"]), provider
        assert answer.usage.prompt_tokens > 0


def check_ranking(url: str) -> None:
    answer = litellm.rerank(
        model=f"hosted_vllm/{POOLED}",
        api_base=f"{url}/v1",
        api_key="none",
        query="hello",
        documents=["zzz", "hello", "help"],
        top_n=2,
    )
    first, _ = answer.results
    assert first["index"] == 1
    assert abs(first["relevance_score"] - 1) < 1e-5
