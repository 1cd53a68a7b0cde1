"""langchain-openai: chat, streams, bound tools, structured output, sync and async."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from common import MODEL, PET, TOOL, is_pet
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field


class Pet(BaseModel):
    """A pet."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=20)


def model(url: str, **fields: Any) -> ChatOpenAI:
    values = {"model": MODEL, "base_url": f"{url}/v1", "api_key": "none", "max_tokens": 120}
    return ChatOpenAI(**{**values, "max_retries": 0, **fields})


def check_invoke(url: str) -> None:
    answer = model(url, max_tokens=8).invoke("Invent a pet.")
    assert answer.content
    assert answer.usage_metadata["output_tokens"] <= 8


def check_stream(url: str) -> None:
    pieces = list(model(url, max_tokens=8, stream_usage=True).stream("Invent a pet."))
    assert "".join(piece.content for piece in pieces)
    assert pieces[-1].usage_metadata or any(piece.usage_metadata for piece in pieces)


def check_tools(url: str) -> None:
    for choice in ("required", "keep", "any"):
        bound = model(url).bind_tools([TOOL], tool_choice=choice, parallel_tool_calls=False)
        (call,) = bound.invoke("Invent a pet.").tool_calls
        assert is_pet(call["args"])
    whole: Any = None
    for piece in model(url).bind_tools([TOOL], tool_choice="keep").stream("Invent a pet."):
        whole = piece if whole is None else whole + piece
    assert is_pet(whole.tool_calls[0]["args"])


def check_structured_output(url: str) -> None:
    for method in ("json_schema", "function_calling"):
        found = model(url).with_structured_output(Pet, method=method).invoke("Invent a pet.")
        assert isinstance(found, Pet)
    plain = model(url).with_structured_output({"title": "Pet", **PET}, method="json_schema")
    assert is_pet(plain.invoke("Invent a pet."))


def check_async(url: str) -> None:
    async def ask() -> None:
        answers = await model(url, max_tokens=4).abatch(["One", "Two", "Three"])
        assert len(answers) == 3
        pieces = [piece async for piece in model(url, max_tokens=4).astream("One")]
        assert pieces

    asyncio.run(ask())


def check_responses_api(url: str) -> None:
    assert model(url, use_responses_api=True, max_tokens=16).invoke("Hello").text


def check_completions(url: str) -> None:
    one = OpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", max_tokens=4, max_retries=0)
    assert one.invoke("Once upon")
