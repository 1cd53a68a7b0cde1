"""pydantic-ai: agents with text, with typed output by tools and by schemas, with a tool of one's
own, sync, async and streamed."""

from __future__ import annotations

import asyncio
from typing import Literal

from common import MODEL
from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Pet(BaseModel):
    """A pet."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=20)


def chat(url: str) -> OpenAIChatModel:
    return OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))


def responses(url: str) -> OpenAIResponsesModel:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    return OpenAIResponsesModel(MODEL, provider=provider)


def check_text(url: str) -> None:
    for model in (chat(url), responses(url)):
        result = Agent(model, model_settings={"max_tokens": 16}).run_sync("Invent a pet.")
        assert result.output
        assert result.usage.output_tokens <= 16


def check_typed(url: str) -> None:
    for model in (chat(url), responses(url)):
        for kind in (ToolOutput(Pet), NativeOutput(Pet)):
            agent = Agent(model, output_type=kind, model_settings={"max_tokens": 200})
            assert isinstance(agent.run_sync("Invent a pet.").output, Pet)


def check_stream(url: str) -> None:
    async def ask() -> None:
        agent = Agent(chat(url), model_settings={"max_tokens": 16})
        async with agent.run_stream("Invent a pet.") as result:
            assert [text async for text in result.stream_text(delta=True)]
        typed = Agent(chat(url), output_type=NativeOutput(Pet), model_settings={"max_tokens": 100})
        async with typed.run_stream("Invent a pet.") as result:
            assert isinstance(await result.get_output(), Pet)

    asyncio.run(ask())
