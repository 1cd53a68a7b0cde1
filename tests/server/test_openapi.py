"""``openapi.json`` says what the server does: its paths, its types, its ranges."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from tests.server.fakes import EchoEngine, chat, completion, with_client
from tests.server.tag_parsers import TagToolParser, ThinkParser
from tests.server.test_auth import OFFERED

from vllm_di.components.messages import RANGES, SamplingParams
from vllm_di.errors import RequestError
from vllm_di.server.openapi import openapi
from vllm_di.server.protocol import REFUSED, PoolingRequest

DOCUMENT = openapi(OFFERED)
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for one in part.values():
            yield from references(one)
    elif isinstance(part, list):
        for one in part:
            yield from references(one)


def test_it_is_served_and_whole() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        answer = await client.get("/openapi.json")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == json.loads(json.dumps(DOCUMENT))

    with_client(test)
    told = {(m.upper(), path) for path, methods in DOCUMENT["paths"].items() for m in methods}
    assert told == {(one.method, re.sub(r":\w+}", "}", one.path)) for one in OFFERED}
    for reference in references(DOCUMENT):
        assert reference.removeprefix("#/components/schemas/") in SCHEMAS
    ids = [o["operationId"] for methods in DOCUMENT["paths"].values() for o in methods.values()]
    assert len(ids) == len(set(ids))


def test_what_is_always_refused_is_not_offered() -> None:
    pooling = {b.__name__ for one in OFFERED if (b := one.body) and issubclass(b, PoolingRequest)}
    for name in SCHEMAS.keys() - pooling:
        assert not SCHEMAS[name].get("properties", {}).keys() & {*REFUSED}
    assert "messages" in SCHEMAS["ChatRequest"]["required"]


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_those_that_are_checked(name: str) -> None:
    low, high = RANGES[name]
    others: dict[str, Any] = {"max_tokens": None} if name == "min_tokens" else {}
    for value in (high, low if name != "top_p" else 0.001):
        SamplingParams(**{**others, name: value})
    for value in (low - 1, high + 1, *([low] if name == "top_p" else [])):
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{**others, name: value})
        assert caught.value.param == name
    found = SCHEMAS["CompletionRequest"]["properties"][name]["anyOf"][0]
    assert (found.get("minimum", found.get("exclusiveMinimum")), found["maximum"]) == (low, high)


ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat("a<think>b</think>c", max_tokens=9, logprobs=True, n=2),
    "/v1/completions": completion("ab", max_tokens=2, logprobs=1, echo=True, return_token_ids=True),
    "/v1/messages": chat("hello", max_tokens=3),
    "/v1/messages/count_tokens": chat("hello"),
    "/v1/responses": {"model": "echo", "input": "hi", "max_output_tokens": 2},
    "/tokenize": {"prompt": "hi", "return_token_strs": True},
    "/detokenize": {"tokens": [104, 105]},
}


def test_answers_have_the_forms_that_it_names() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        kept = ""
        for one in sorted(OFFERED, key=lambda one: one.method != "POST"):
            if one.answer is None or one.path.endswith("/cancel"):
                continue
            if one.body is not None and issubclass(one.body, PoolingRequest):
                continue  # of another engine: test_embeddings.py
            assert one.body is None or one.path in ASKED, "an example belongs here"
            path = one.path.replace("{model:path}", "echo").replace("{id}", kept)
            answer = await client.request(one.method, path, json=ASKED.get(one.path))
            assert answer.status_code == 200, (path, answer.text)
            strict = msgspec.json.decode(answer.content, type=one.answer)
            known = {*one.answer.__struct_fields__}
            if one.answer.__name__ != "Response":  # which repeats fields of its request
                assert {*answer.json()} <= known, path
            kept = getattr(strict, "id", kept) if one.path == "/v1/responses" else kept
        wrong = await client.post("/v1/chat/completions", json={"messages": 3})
        assert wrong.json()["error"]["code"] == "invalid_type"

    parsers: dict[str, Any] = {"tool_parser": TagToolParser(), "reasoning_parser": ThinkParser()}
    with_client(test, **parsers)
