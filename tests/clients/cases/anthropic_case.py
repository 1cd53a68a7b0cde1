"""anthropic: messages, sync, async and streamed, tools and counts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
from common import MODEL, PET, QUESTION, is_pet

TOOL: Any = {"name": "keep", "description": "Keeps a pet.", "input_schema": PET}


def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def check_message(url: str) -> None:
    message = client(url).messages.create(
        model=MODEL, max_tokens=8, messages=QUESTION, system="Be brief.", metadata={"user_id": "u"}
    )
    assert message.content[0].text
    assert message.usage.output_tokens <= 8


def check_stream(url: str) -> None:
    with client(url).messages.stream(model=MODEL, max_tokens=8, messages=QUESTION) as stream:
        text = "".join(stream.text_stream)
        assert text.strip() == stream.get_final_message().content[0].text.strip()


def check_tools(url: str) -> None:
    for choice in (
        {"type": "any", "disable_parallel_tool_use": True},
        {"type": "tool", "name": "keep"},
    ):
        message = client(url).messages.create(
            model=MODEL, max_tokens=120, messages=QUESTION, tools=[TOOL], tool_choice=choice
        )
        (block,) = [block for block in message.content if block.type == "tool_use"]
        assert is_pet(block.input)
        assert message.stop_reason == "tool_use"
        history = [
            *QUESTION,
            {"role": "assistant", "content": [b.model_dump() for b in message.content]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "kept"}],
            },
        ]
        client(url).messages.create(model=MODEL, max_tokens=4, messages=history, tools=[TOOL])


def check_schema(url: str) -> None:
    message = client(url).messages.create(
        model=MODEL,
        max_tokens=60,
        messages=QUESTION,
        output_config={"format": {"type": "json_schema", "schema": PET}},
    )
    assert is_pet(json.loads(message.content[0].text))


def check_count(url: str) -> None:
    assert client(url).messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens > 3


def check_async(url: str) -> None:
    async def ask() -> None:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as one:
            async with one.messages.stream(model=MODEL, max_tokens=8, messages=QUESTION) as stream:
                assert [event async for event in stream]
            assert (await stream.get_final_message()).content

    asyncio.run(ask())


def check_errors(url: str) -> None:
    try:
        client(url).messages.create(model="none", max_tokens=8, messages=QUESTION)
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error"
    else:
        raise AssertionError
