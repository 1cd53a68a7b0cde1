"""openai: both of its APIs, sync, async and streamed; its errors and their classes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
from common import MODEL, PET, QUESTION, TOOL, is_pet

FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": PET}}


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def check_models(url: str) -> None:
    assert [model.id for model in client(url).models.list()] == [MODEL]
    assert client(url).models.retrieve(MODEL).id == MODEL


def check_chat(url: str) -> None:
    answer = client(url).chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_completion_tokens=8,
        n=2,
        seed=1,
        logprobs=True,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        verbosity="low",
        prompt_cache_key="k",
        safety_identifier="s",
    )
    assert len(answer.choices) == 2
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def check_chat_stream(url: str) -> None:
    chunks = list(
        client(url).chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage.completion_tokens == 8
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1])


def check_stream_helper(url: str) -> None:
    with client(url).chat.completions.stream(
        model=MODEL, messages=QUESTION, max_tokens=60, response_format=FORMAT
    ) as stream:
        for _ in stream:
            pass
        found = stream.get_final_completion()
    assert is_pet(json.loads(found.choices[0].message.content))


def check_schema(url: str) -> None:
    answer = client(url).chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=60, response_format=FORMAT
    )
    assert is_pet(json.loads(answer.choices[0].message.content))


def check_tools(url: str) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "keep"}}):
        answer = client(url).chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            max_tokens=120,
            tools=[TOOL],
            tool_choice=choice,
            parallel_tool_calls=False,
        )
        (call,) = answer.choices[0].message.tool_calls
        assert is_pet(json.loads(call.function.arguments))
        history = [
            *QUESTION,
            answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "kept"},
        ]
        again = client(url).chat.completions.create(model=MODEL, messages=history, max_tokens=4)
        assert again.choices[0].finish_reason


def check_async(url: str) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as one:
            answers = await asyncio.gather(
                *(
                    one.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=4)
                    for _ in range(3)
                )
            )
            assert all(answer.choices[0].message.content for answer in answers)
            stream = await one.completions.create(
                model=MODEL, prompt="Once", max_tokens=4, stream=True
            )
            assert "".join([chunk.choices[0].text async for chunk in stream])

    asyncio.run(ask())


def check_responses(url: str) -> None:
    one = client(url)
    first = one.responses.create(
        model=MODEL,
        input="My name is Ann.",
        max_output_tokens=16,
        include=[],
    )
    assert first.output_text
    assert one.responses.retrieve(first.id).id == first.id
    second = one.responses.create(
        model=MODEL, input="Who am I?", previous_response_id=first.id, max_output_tokens=16
    )
    assert second.previous_response_id == first.id
    tool = {"type": "function", "name": "keep", "parameters": PET, "strict": True}
    called = one.responses.create(
        model=MODEL,
        input="Invent a pet.",
        tools=[tool],
        tool_choice="required",
        max_output_tokens=120,
        parallel_tool_calls=False,
    )
    (call,) = [item for item in called.output if item.type == "function_call"]
    assert is_pet(json.loads(call.arguments))
    events = list(one.responses.create(model=MODEL, input="Hi", max_output_tokens=16, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    one.responses.delete(first.id)


def check_errors(url: str) -> None:
    one = client(url)
    for wrong, kind in (
        ({"model": "none"}, openai.NotFoundError),
        ({"temperature": 200}, openai.BadRequestError),
        ({"max_tokens": 10**9}, openai.BadRequestError),
    ):
        try:
            one.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **wrong})
        except kind as error:
            assert error.param, error
        else:
            raise AssertionError(wrong)
