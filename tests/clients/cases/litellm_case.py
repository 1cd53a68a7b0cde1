"""litellm: as an OpenAI server, as vLLM and as Anthropic, sync, async and streamed."""

from __future__ import annotations

import asyncio
import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm
from common import MODEL, PET, QUESTION, TOOL, is_pet

FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": PET}}


def fields(url: str, provider: str = "openai") -> dict[str, object]:
    return {
        "model": f"{provider}/{MODEL}",
        "api_base": url if provider == "anthropic" else f"{url}/v1",
        "api_key": "none",
        "messages": QUESTION,
        "num_retries": 0,
    }


def check_providers(url: str) -> None:
    for provider in ("openai", "hosted_vllm", "anthropic"):
        answer = litellm.completion(**fields(url, provider), max_tokens=8)
        assert answer.choices[0].message.content, provider
        assert answer.usage.completion_tokens <= 8


def check_stream(url: str) -> None:
    for provider in ("openai", "hosted_vllm", "anthropic"):
        stream = litellm.completion(**fields(url, provider), max_tokens=8, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream), provider


def check_tools(url: str) -> None:
    for provider in ("openai", "hosted_vllm", "anthropic"):
        answer = litellm.completion(
            **fields(url, provider),
            max_tokens=120,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "keep"}},
        )
        # litellm leaves out additionalProperties, so the model may add some of its own
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "keep"
        assert call.function.arguments.startswith('{"kind": "'), provider


def check_schema(url: str) -> None:
    for provider in ("openai", "hosted_vllm"):
        answer = litellm.completion(**fields(url, provider), max_tokens=60, response_format=FORMAT)
        assert is_pet(json.loads(answer.choices[0].message.content))


def check_async(url: str) -> None:
    async def ask() -> None:
        answer = await litellm.acompletion(**fields(url), max_tokens=4)
        assert answer.choices[0].message.content
        stream = await litellm.acompletion(**fields(url), max_tokens=4, stream=True)
        assert [chunk async for chunk in stream]

    asyncio.run(ask())


def check_text_completion(url: str) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=f"{url}/v1",
        api_key="none",
        prompt="Once upon",
        max_tokens=4,
    )
    assert answer.choices[0].text
