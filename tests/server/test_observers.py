"""What is told of a request that has ended: to traces, and to the access log."""

from __future__ import annotations

import logging
import re
from typing import Any

import httpx
import pytest
from tests.server.fakes import CHAT, COMPLETIONS, EchoEngine, chat, completion, with_client

from vllm_di.components.interfaces import TracedRequest, Tracing
from vllm_di.components.tracing.attributes import attributes, span_name

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Kept(Tracing):
    def __init__(self, *, fails: bool = False) -> None:
        self.requests: list[TracedRequest] = []
        self._fails = fails

    def record(self, request: TracedRequest) -> None:
        self.requests.append(request)
        if self._fails:
            raise OSError("no room")


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_span_is_made_of(stream: bool) -> None:
    kept = Kept()

    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        sent = {"x-request-id": "mine", "traceparent": PARENT, "tracestate": "a=b"}
        body = chat("hello", max_tokens=4, n=2, temperature=0.5, stream=stream)
        assert (await client.post(CHAT, json=body, headers=sent)).status_code == 200

    with_client(test, tracing=kept)
    (one,) = kept.requests
    assert (one.route, one.operation, one.model) == (CHAT, "chat", "echo")
    assert (one.request_id, one.status, one.error) == ("mine", 200, None)
    assert one.headers == {"traceparent": PARENT, "tracestate": "a=b"}
    assert one.response_id is not None
    assert one.response_id.startswith("chatcmpl-")
    assert one.params is not None
    assert (one.params.n, one.params.temperature) == (2, 0.5)
    assert [c.finish_reason for c in one.choices] == ["length", "length"]
    assert [c.num_generated_tokens for c in one.choices] == [4, 4]
    assert one.ended > one.started > 1_700_000_000
    assert span_name(one) == "chat echo"
    found = attributes(one)
    assert found["gen_ai.usage.prompt_tokens"] == 5
    assert found["gen_ai.usage.completion_tokens"] == 8
    assert found["gen_ai.latency.time_in_queue"] == 0.001
    assert "hello" not in str(one), "no text of a request"


def test_every_kind_of_request_with_a_body() -> None:
    kept = Kept()

    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        asked: list[tuple[str, dict[str, Any]]] = [
            (COMPLETIONS, completion(["ab", "abc"], max_tokens=2, n=2)),
            ("/v1/messages", chat("hello", max_tokens=2)),
            ("/v1/responses", {"model": "echo", "input": "hi", "max_output_tokens": 2}),
            ("/tokenize", {"prompt": "hi"}),
            (CHAT, chat(temperature=-1)),
            (CHAT, {"messages": 3}),
        ]
        for path, body in asked:
            await client.post(path, json=body)
        await client.post("/no/such/path", json={})
        await client.get("/health")

    with_client(test, tracing=kept)
    assert [(r.route, r.status, r.error) for r in kept.requests] == [
        (COMPLETIONS, 200, None),
        ("/v1/messages", 200, None),
        ("/v1/responses", 200, None),
        ("/tokenize", 200, None),
        (CHAT, 400, "400"),
        (CHAT, 400, "invalid_type"),
    ]
    two_prompts = attributes(kept.requests[0])
    assert two_prompts["gen_ai.usage.num_sequences"] == 4
    assert two_prompts["gen_ai.usage.input_tokens"] == 3 + 4
    assert two_prompts["gen_ai.usage.output_tokens"] == 8
    assert [len(r.choices) for r in kept.requests] == [4, 1, 1, 0, 0, 0]
    assert span_name(kept.requests[3]) == "POST /tokenize"


def test_tracing_that_fails_costs_no_request(caplog: pytest.LogCaptureFixture) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        for _ in range(3):
            answer = await client.post(CHAT, json=chat(max_tokens=1))
            assert answer.status_code == 200

    with_client(test, tracing=Kept(fails=True))
    assert [r.getMessage() for r in caplog.records if "traced" in r.getMessage()] == [
        "a request could not be traced: OSError('no room')"
    ]


def test_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        own = {"x-request-id": "mine"}
        await client.post(CHAT, json=chat(max_tokens=1), headers=own)
        await client.get("/a%0Ab?key=secret", headers=own)

    with_client(test, access_log=True)
    records = [r for r in caplog.records if r.name == "vllm_di.server.observers"]
    first, second = (r.getMessage() for r in records)
    assert re.fullmatch(rf'127.0.0.1:123 "POST {CHAT}" 200 \d+\.\d ms mine', first)
    assert re.fullmatch(r'127.0.0.1:123 "GET /a%0Ab" 404 \d+\.\d ms mine', second)
    assert records[0].levelno == logging.INFO
    assert records[0].__dict__["fields"]["status"] == 200


def test_no_access_log_by_default(caplog: pytest.LogCaptureFixture) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        await client.get("/health")

    with_client(test)
    assert "/health" not in caplog.text
