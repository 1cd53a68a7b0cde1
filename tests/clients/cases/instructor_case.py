"""instructor: each way in which it asks for a model of pydantic, sync, async and in pieces."""

from __future__ import annotations

import asyncio
from typing import Literal

import instructor
import openai
from common import MODEL, QUESTION
from pydantic import BaseModel, ConfigDict, Field


class Pet(BaseModel):
    """A pet."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=20)


MODES = [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT]


def check_modes(url: str) -> None:
    for mode in MODES:
        client = instructor.from_openai(
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=mode
        )
        found = client.chat.completions.create(
            model=MODEL, messages=QUESTION, response_model=Pet, max_tokens=120, max_retries=0
        )
        assert isinstance(found, Pet), mode


def check_partial(url: str) -> None:
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=instructor.Mode.TOOLS
    )
    *_, last = client.chat.completions.create_partial(
        model=MODEL, messages=QUESTION, response_model=Pet, max_tokens=120
    )
    assert last.kind in ("cat", "dog")


def check_async(url: str) -> None:
    async def ask() -> None:
        client = instructor.from_openai(
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none"),
            mode=instructor.Mode.JSON_SCHEMA,
        )
        found = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, response_model=Pet, max_tokens=120
        )
        assert isinstance(found, Pet)

    asyncio.run(ask())
