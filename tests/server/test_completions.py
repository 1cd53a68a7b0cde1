"""Plain completions: kinds of prompts, echo, the legacy log-probabilities, streams."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.server.fakes import COMPLETIONS, EchoEngine, completion, with_client
from tests.server.test_chat import events

BOS = 256


def texts(body: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in body["choices"]]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["ab", "c"], [[BOS, 97, 98], [BOS, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_kinds_of_prompts(prompt: Any, prompts: list[list[int]]) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        response = await client.post(COMPLETIONS, json=completion(prompt, max_tokens=6))
        body = response.json()
        assert response.status_code == 200, body
        assert [r.prompt_token_ids for r in engine.requests] == prompts
        repeated = [bytes(i for i in (p * 6)[:6] if i < 256).decode() for p in prompts]
        assert texts(body) == repeated
        assert body["object"] == "text_completion"
        assert [c["index"] for c in body["choices"]] == list(range(len(prompts)))
        assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))
        assert len({r.request_id for r in engine.requests}) == len(prompts)
        streamed = events(
            await client.post(COMPLETIONS, json=completion(prompt, max_tokens=6, stream=True))
        )
        choices = [c for chunk in streamed for c in chunk["choices"]]
        for i, text in enumerate(repeated):
            assert "".join(c["text"] for c in choices if c["index"] == i) == text

    with_client(test)


def test_default_length_and_n() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        body = (await client.post(COMPLETIONS, json=completion([97], n=2))).json()
        assert texts(body) == ["a" * 16] * 2
        both = completion([[97], [98]], n=2, max_tokens=1)
        assert texts((await client.post(COMPLETIONS, json=both)).json()) == ["a", "a", "b", "b"]

    with_client(test)


@pytest.mark.parametrize("stream", [False, True])
def test_echo(stream: bool) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        request = completion([97, 98], echo=True, max_tokens=3, stream=stream)
        response = await client.post(COMPLETIONS, json=request)
        if stream:
            text = "".join(c["text"] for chunk in events(response) for c in chunk["choices"])
        else:
            (text,) = texts(response.json())
        assert text == "ababa"

    with_client(test)


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_a_prompt(stream: bool) -> None:
    """What lm-eval asks for: echo, log-probabilities and no new tokens."""

    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        request = completion("hé", echo=True, max_tokens=0, logprobs=1, stream=stream)
        response = await client.post(COMPLETIONS, json=request)
        if stream:
            chunks = [c for chunk in events(response) for c in chunk["choices"]]
            logprobs = next(c["logprobs"] for c in chunks if c["logprobs"])
            text = "".join(c["text"] for c in chunks)
        else:
            body = response.json()
            assert body["usage"]["completion_tokens"] == 0
            (choice,) = body["choices"]
            text, logprobs = choice["text"], choice["logprobs"]
        assert text == "hé"
        assert logprobs["tokens"] == ["<s>", "h", "\ufffd", "\ufffd"]
        assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5]
        assert logprobs["top_logprobs"][1] == {"h": -0.5}
        assert logprobs["text_offset"] == [0, 0, 1, 1], "<s> is not in the text; é is two tokens"

    with_client(test)


def test_legacy_logprobs() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        request = completion([97, 98], logprobs=2, max_tokens=3)
        body = (await client.post(COMPLETIONS, json=request)).json()
        logprobs = body["choices"][0]["logprobs"]
        assert logprobs == {
            "tokens": ["a", "b", "a"],
            "token_logprobs": [-0.5] * 3,
            "top_logprobs": [
                {"a": -0.5, "A": -1.0},
                {"b": -0.5, "A": -1.0},
                {"a": -0.5, "A": -1.0},
            ],
            "text_offset": [0, 1, 2],
        }
        streamed = events(await client.post(COMPLETIONS, json={**request, "stream": True}))
        pieces = [c["logprobs"] for chunk in streamed for c in chunk["choices"]]
        assert [p["text_offset"] for p in pieces] == [[0], [1], [2]]
        plain = {**request, "logprobs": 0}
        body = (await client.post(COMPLETIONS, json=plain)).json()
        assert body["choices"][0]["logprobs"]["top_logprobs"] is None

    with_client(test)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_offsets_point_into_the_text(stream: bool, echo: bool) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        prompt = [*"A 🦙é eats".encode()]
        request = completion(prompt, logprobs=0, max_tokens=len(prompt), echo=echo, stream=stream)
        response = await client.post(COMPLETIONS, json=request)
        chunks = events(response) if stream else [response.json()]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        text = "".join(choice["text"] for choice in choices)
        told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        tokens = [token for part in told for token in part["tokens"]]
        offsets = [offset for part in told for offset in part["text_offset"]]
        assert text == "A 🦙é eats" * (1 + echo)
        want = [0, 1, 2, 2, 2, 2, 3, 3, 4, 5, 6, 7, 8]
        assert offsets == want + [9 + offset for offset in want] * echo
        for token, offset in zip(tokens, offsets, strict=True):
            assert token == "\ufffd" or text[offset:].startswith(token)

    with_client(test)


def test_stop_and_token_ids() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        request = completion([97, 98, 99], stop="c", max_tokens=9, return_token_ids=True)
        (choice,) = (await client.post(COMPLETIONS, json=request)).json()["choices"]
        assert (choice["text"], choice["stop_reason"]) == ("ab", "c")
        assert choice["token_ids"] == [97, 98, 99]
        assert choice["prompt_token_ids"] == [97, 98, 99]
        streamed = events(await client.post(COMPLETIONS, json={**request, "stream": True}))
        ids = [i for chunk in streamed for c in chunk["choices"] for i in c["token_ids"]]
        assert ids == [97, 98, 99]

    with_client(test)


DEFAULTS = {"temperature": 0.25, "top_k": 7, "repetition_penalty": 1.5, "max_tokens": 4}


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
@pytest.mark.parametrize("own", [{}, {"temperature": 0.0, "top_k": 0, "max_tokens": 2}])
def test_defaults_hold_where_a_request_says_nothing(path: str, own: dict[str, Any]) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        asked: dict[str, Any] = {"prompt": "hi"} if path == COMPLETIONS else {}
        asked |= {} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
        body = (await client.post(path, json={**asked, **own})).json()
        want = {**DEFAULTS, **own}
        assert body["usage"]["completion_tokens"] == want["max_tokens"]
        params = engine.requests[-1].params
        assert {name: getattr(params, name) for name in want} == want
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert model["default_sampling_params"] == DEFAULTS

    with_client(test, sampling=DEFAULTS)


def test_an_integer_with_a_point_beside_a_bias() -> None:
    """Some clients write integers so; keys of a bias are texts in JSON all the same."""

    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        body = completion("ab", max_tokens=2.0, logit_bias={"65": 1})
        answer = await client.post(COMPLETIONS, json=body)
        assert answer.status_code == 200, answer.text
        assert engine.requests[0].params.logit_bias == {65: 1.0}

    with_client(test)


@pytest.mark.parametrize("name", ["suffix", "best_of"])
def test_what_cannot_be_honoured_is_refused_by_its_name(name: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        fields = {"suffix": "the end"} if name == "suffix" else {"n": 2, "best_of": 3}
        response = await client.post(COMPLETIONS, json=completion("ab", **fields))
        error = response.json()["error"]
        assert response.status_code == 400
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert error["message"] == f"{name} is not supported by this server"
        assert not engine.requests
        plain = completion("ab", max_tokens=2, suffix="", best_of=1)
        assert (await client.post(COMPLETIONS, json=plain)).status_code == 200

    with_client(test)
