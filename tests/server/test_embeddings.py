"""/v1/embeddings of a whole server: OpenAI's client, the page's examples, and bad requests."""

from __future__ import annotations

import asyncio
import base64
import re
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from tests.server.fakes import (
    CHAT,
    COMPLETIONS,
    REPORT,
    EchoEngine,
    client_of,
    make_server,
    with_client,
)
from tests.server.served import served
from tests.server.test_observers import Kept

from vllm_di.components.messages import EngineRequest, Pooling, TokenOutput
from vllm_di.components.tracing.attributes import attributes, span_name
from vllm_di.server import answers

PAGE = Path(__file__).parents[2] / "docs/embeddings.md"
SETTINGS = [
    "model=tiny",
    "platform=cpu",
    "model.dtype=float32",
    "pooler=mean",
    "pooler.dimensions=[16,32]",
    "model.max_model_len=128",
    "server.max_inputs=300",
]
PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(SETTINGS) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as api:
        yield api


def vectors(client: httpx.Client, value: Any, **fields: Any) -> list[Any]:
    response = client.post(PATH, json={"input": value, **fields})
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    msgspec.json.decode(response.content, type=answers.Embeddings)
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["embedding"] for entry in data]


def test_openais_client(api: openai.OpenAI) -> None:
    """It asks for base64 unless it is told otherwise."""
    texts = ["hello", "a much longer text", "hello"]
    answer = api.embeddings.create(model="tiny", input=texts)
    plain = api.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [len(entry.embedding) for entry in answer.data] == [64] * 3
    for one, other in zip(answer.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
        assert sum(x * x for x in one.embedding) == pytest.approx(1.0, abs=1e-5)
    assert answer.data[0].embedding == answer.data[2].embedding != answer.data[1].embedding
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(t) + 1 for t in texts)
    short = api.embeddings.create(model="tiny", input="hello", dimensions=16).data[0].embedding
    assert len(short) == 16
    assert sum(x * x for x in short) == pytest.approx(1.0, abs=1e-5)


def test_kinds_of_input(client: httpx.Client) -> None:
    (text,) = vectors(client, "ab")
    assert vectors(client, ["ab", "ab"]) == [text, text]
    assert vectors(client, [256, 97, 98]) == [text]
    assert vectors(client, [[256, 97, 98], [97]])[0] == text
    (bare,) = vectors(client, "ab", add_special_tokens=False)
    assert vectors(client, [97, 98]) == [bare]
    (encoded,) = vectors(client, "ab", encoding_format="base64")
    assert list(struct.unpack("<64f", base64.b64decode(encoded))) == pytest.approx(text, abs=1e-7)
    many = vectors(client, [f"{i} times" for i in range(300)])
    assert many[17] == vectors(client, "17 times")[0]


def test_truncation(client: httpx.Client) -> None:
    (whole,) = vectors(client, "x" * 127)
    assert vectors(client, "x" * 500, truncate_prompt_tokens=-1) == [whole]
    assert vectors(client, "abcdef", truncate_prompt_tokens=3) == vectors(client, "ab")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "input", "needed"),
        ({"input": []}, "input", "empty"),
        ({"input": [[]]}, "input", "empty"),
        ({"input": [[97], []]}, "input", "empty"),
        ({"input": ["a"] * 100_000}, "input", "server.max_inputs"),
        ({"input": "x" * 128}, "input", "128 tokens at most"),
        ({"input": [97] * 129}, "input", "128 tokens at most"),
        ({"input": [320]}, "input", "vocabulary"),
        ({"input": [-1]}, "input", "vocabulary"),
        ({"input": ["a", 97]}, "input", "mix"),
        ({"input": {"a": 1}}, "input", "Expected"),
        ({"input": "a", "dimensions": 17}, "dimensions", "16, 32"),
        ({"input": "a", "dimensions": 0}, "dimensions", "16, 32"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "int8"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1"),
        ({"input": "aaa", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens", "no room"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests(
    fields: dict[str, Any], param: str | None, words: str, client: httpx.Client
) -> None:
    (before,) = vectors(client, "canary")
    response = client.post(PATH, json=fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], words in error["message"]) == (param, True), error
    assert vectors(client, "canary") == [before]


def test_another_model_and_other_endpoints(client: httpx.Client) -> None:
    assert client.post(PATH, json={"input": "a", "model": "other"}).status_code == 404
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": "a"}]},
        COMPLETIONS: {"prompt": "a"},
        "/v1/responses": {"input": "a"},
        "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5},
    }
    for path, body in bodies.items():
        response = client.post(path, json={"model": "tiny", **body})
        assert response.status_code == 400, path
        assert "generates no text" in response.text
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["pooling"]["kind"], model["pooling"]["size"]) == ("embedding", 64)
    vectors(client, "counted")
    metrics = client.get("/metrics").text
    assert re.search(r"vllm:prompt_tokens_total\{[^}]*\} [1-9]", metrics)


class SecondReplica(EchoEngine):
    """Answers as the second of two replicas of a model that pools."""

    def __init__(self) -> None:
        super().__init__()
        self.report = msgspec.structs.replace(REPORT, pooling=Pooling(size=2))

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        yield TokenOutput(
            request_id=request.request_id,
            vector=struct.pack("<2f", 0.6, 0.8),
            finish_reason="stop",
            replica=1,
        )


def test_each_replica_counts_for_itself() -> None:
    async def main() -> str:
        async with client_of(make_server(SecondReplica())) as client:
            assert (await client.post(PATH, json={"input": "abc"})).status_code == 200
            assert (
                await client.post("/v1/score", json={"text_1": "a", "text_2": "b"})
            ).status_code == 200
            return (await client.get("/metrics")).text

    text = asyncio.run(main())
    tokens = re.findall(r'vllm:prompt_tokens_total\{engine="(\d)",[^}]*\} (\S+)', text)
    assert dict(tokens) == {"0": "0.0", "1": "8.0"}
    ended = re.findall(r'vllm:request_success_total\{engine="(\d)",[^}]*\} ([1-9]\S*)', text)
    assert ended == [("1", "3.0")]
    assert 'http_requests_total{handler="/v1/score",status="2xx"} 1.0' in text


def test_a_span_has_the_texts_that_were_pooled() -> None:
    kept = Kept()

    async def main() -> None:
        async with client_of(make_server(SecondReplica(), tracing=kept)) as client:
            assert (await client.post(PATH, json={"input": ["abc", "d"]})).status_code == 200

    asyncio.run(main())
    (one,) = kept.requests
    found = attributes(one)
    assert span_name(one) == "embeddings echo"
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (6, 0)
    assert "gen_ai.latency.time_to_first_token" not in found


def test_a_model_that_generates_says_so() -> None:
    async def test(client: httpx.AsyncClient, engine: object) -> None:
        response = await client.post(PATH, json={"input": "a"})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("pooling_off", "model")
        assert (await client.get("/v1/models")).json()["data"][0]["pooling"] is None

    with_client(test)


def test_the_blocks_of_the_page_run(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"URL": f"{url}/v1", "MODEL": "tiny"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert capsys.readouterr().out.startswith("2 64\n")
    names["client"].close()
