"""Hostile and mistaken requests: a clear 4xx in OpenAI's form, and the next request is answered."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.fakes import (
    CHAT,
    COMPLETIONS,
    EchoEngine,
    chat,
    client_of,
    completion,
    make_server,
    with_client,
)

JSON = {"content-type": "application/json"}
HUGE = "1" + "0" * 400


async def check_alive(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETIONS, json=completion([104, 105], max_tokens=2))
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == "hi"


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error, of whose form every field is checked."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert response.headers["content-type"] == "application/json"
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "Traceback" not in response.text
    return error


BAD_JSON = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x"} trailing',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": -Infinity}',
    b'{"prompt": "x", "deep": ' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"prompt": "x", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "x", "deep": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
    b"[" * 1_000_000,
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_bad_json(path: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        for body in BAD_JSON:
            error_of(await client.post(path, content=body, headers=JSON))
        await check_alive(client)

    with_client(test)


def test_brackets_in_strings_are_not_depth() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        text = '[{"\\' * 50
        response = await client.post("/tokenize", json={"prompt": text, "x": [[], "]]" * 99]})
        assert response.json()["count"] == len(text) + 1

    with_client(test)


BAD_FIELDS: list[tuple[str, str, str | None]] = [
    ("temperature", "-1", "temperature"),
    ("temperature", "1e30", "temperature"),
    ("temperature", "1e999", "temperature"),
    ("temperature", HUGE, "temperature"),
    ("temperature", '"hot"', "temperature"),
    ("temperature", "true", "temperature"),
    ("top_p", "0", "top_p"),
    ("top_p", "1.5", "top_p"),
    ("top_k", "-2", "top_k"),
    ("top_k", HUGE, "top_k"),
    ("top_k", "1.5", "top_k"),
    ("min_p", "2", "min_p"),
    ("presence_penalty", "-3", "presence_penalty"),
    ("frequency_penalty", "3", "frequency_penalty"),
    ("repetition_penalty", "0", "repetition_penalty"),
    ("n", "0", "n"),
    ("n", "-5", "n"),
    ("n", "129", "n"),
    ("n", HUGE, "n"),
    ("seed", HUGE, "seed"),
    ("seed", "1" + "0" * 5_000, "seed"),
    ("seed", '"x"', "seed"),
    ("max_tokens", "-1", "max_tokens"),
    ("max_tokens", "1000000", "max_tokens"),
    ("max_tokens", HUGE, "max_tokens"),
    ("min_tokens", "99", "min_tokens"),
    ("min_tokens", "-1", "min_tokens"),
    ("stop", '[""]', "stop"),
    ("stop", "[1]", "stop"),
    ("stop", json.dumps(["a"] * 17), "stop"),
    ("stop", json.dumps("a" * 5000), "stop"),
    ("stop_token_ids", "[-1]", "stop_token_ids"),
    ("stop_token_ids", "[300]", "stop_token_ids"),
    ("allowed_token_ids", "[]", "allowed_token_ids"),
    ("allowed_token_ids", "[999]", "allowed_token_ids"),
    ("logit_bias", '{"97": 101}', "logit_bias"),
    ("logit_bias", '{"999": 1}', "logit_bias"),
    ("logit_bias", '{"x": 1}', "logit_bias"),
    ("logit_bias", '{"-1": 1}', "logit_bias"),
    ("bad_words", '[" "]', "bad_words"),
    ("prompt_logprobs", "-1", "prompt_logprobs"),
    ("prompt_logprobs", "21", "prompt_logprobs"),
    ("priority", HUGE, "priority"),
    ("cache_salt", '""', "cache_salt"),
    ("stream", '"yes"', "stream"),
    ("stream_options", '{"include_usage": true}', "stream_options"),
    ("stream_options", "[]", "stream_options"),
    ("response_format", '"json"', "response_format"),
    ("model", "7", "model"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bad_fields(path: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        base = chat() if path == CHAT else completion()
        for name, value, param in BAD_FIELDS:
            fields = {**base, "max_tokens": 4, name: "?"}
            body = json.dumps(fields).replace('"?"', value)
            error = error_of(await client.post(path, content=body, headers=JSON))
            assert error["param"] == param, (name, value, error)
        assert not engine.requests, "nothing of this may reach the engine"
        await check_alive(client)

    with_client(test)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [1]}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "prompt"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_bad_chat(fields: dict[str, Any], param: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        error = error_of(await client.post(CHAT, json={**chat(), **fields}))
        assert error["param"] == param
        await check_alive(client)

    with_client(test)


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        "",
        None,
        7,
        {},
        [[]],
        ["a", 1],
        [1, "a"],
        [[1], "a"],
        [-1],
        [300],
        [1.5],
        [True],
        [[300]],
    ],
)
def test_bad_prompts(prompt: Any) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        # The stand-in puts a token before every text, so that an empty text is a prompt.
        options = {"add_special_tokens": False}
        error = error_of(await client.post(COMPLETIONS, json=completion(prompt, **options)))
        assert error["param"] == "prompt"
        await check_alive(client)

    with_client(test)


@pytest.mark.parametrize(
    ("path", "name", "typed"),
    [(CHAT, "messages", "mesages"), (COMPLETIONS, "prompt", "promt"), (CHAT, "messages", "colour")],
)
def test_a_needed_field_that_is_missing_or_misspelt(path: str, name: str, typed: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        body = chat() if path == CHAT else completion()
        body[typed] = body.pop(name)
        error = error_of(await client.post(path, json=body))
        hint = "" if typed == "colour" else f", and '{typed}' is no field; did you mean '{name}'?"
        assert error["message"] == f"{name}: this field is needed{hint}"
        assert error["param"] == name
        await check_alive(client)

    with_client(test)


def test_too_long_a_prompt_says_the_figures() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        for request, figures in [
            (chat("x" * 256), ("256",)),
            (chat("x" * 200, max_tokens=100), ("256", "200", "100")),
            (chat("x" * 50_000), ("50000",)),
        ]:
            error = error_of(await client.post(CHAT, json=request))
            assert error["code"] == "context_length_exceeded"
            assert all(figure in error["message"] for figure in figures)
        await check_alive(client)

    with_client(test)


def said(content: Any) -> dict[str, Any]:
    return {
        "model": "echo",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": content}],
    }


MESSAGES, EMBEDDINGS = "/v1/messages", "/v1/embeddings"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (MESSAGES, said([{"type": "txt", "text": "a"}]), "did you mean 'text'?"),
        (MESSAGES, said([{"type": "txt"}]), "messages[0].content[0].type: expected document"),
        (MESSAGES, said([{"type": "text"}]), "messages[0].content[0]: Object missing"),
        (MESSAGES, said([{"type": "x" * 9000}]), f"got '{'x' * 80}'"),
        (CHAT, chat() | {"logit_bias": {"x": 1}}, "a key of logit_bias: Expected `int`"),
        (CHAT, chat() | {"stop": ["a", 1]}, "stop[1]: Expected `str`"),
        (EMBEDDINGS, {"input": "a", "encoding_format": "flt"}, "expected base64, float, got 'flt'"),
        (EMBEDDINGS, {"input": ["a", {}]}, "input[1]: Expected"),
        (EMBEDDINGS, [], "the body: Expected `object`"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_that_its_type_does_not_take(path: str, body: Any, words: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        response = await client.post(path, json=body)
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert words in message
        assert len(message) < 400

    with_client(test)


def test_unknown_model_path_and_method() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        error = error_of(await client.post(CHAT, json={**chat(), "model": "gpt-9"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert error_of(await client.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"
        for path, words in {
            "/v1/nothing": "there is no path '/v1/nothing'",
            "/chat/completions": "did you mean '/v1/chat/completions'?",
            "/v1/v1/messages": "did you mean '/v1/messages'?",
            "/v1/audio/speech": "audio is not supported by this server",
            "/v1/images/generations": "images is not supported by this server",
            "/v1/batches": "batches is not supported by this server; vllm-di run-batch",
        }.items():
            error = error_of(await client.post(path, json={}), 404)
            assert error["code"] == "unknown_path"
            assert words in error["message"]
        response = await client.get(CHAT)
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert "POST" in response.headers["allow"]
        without_model = {k: v for k, v in chat(max_tokens=1).items() if k != "model"}
        assert (await client.post(CHAT, json=without_model)).status_code == 200

    with_client(test)


def test_body_too_large_and_wrong_kind() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        body = json.dumps(completion("x" * 5000)).encode()
        error = error_of(await client.post(COMPLETIONS, content=body, headers=JSON), 413)
        assert error["code"] == "body_too_large"

        async def pieces() -> Any:
            for _ in range(100):
                yield b"x" * 100

        error_of(await client.post(COMPLETIONS, content=pieces(), headers=JSON), 413)
        form = {"content-type": "application/x-www-form-urlencoded"}
        error_of(await client.post(COMPLETIONS, content=b"{}", headers=form), 415)
        await check_alive(client)

    with_client(test, max_body_bytes=4096)


def test_unknown_fields_are_counted_or_refused() -> None:
    request = completion("x", max_tokens=1, temprature=0.5, user="me")

    async def counted(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        assert (await client.post(COMPLETIONS, json=request)).status_code == 200
        text = (await client.get("/metrics")).text
        (line,) = [x for x in text.splitlines() if x.startswith("vllm_di:unknown_request_fields_t")]
        assert line.endswith(" 1.0")

    async def refused(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        error = error_of(await client.post(COMPLETIONS, json=request))
        assert (error["param"], error["code"]) == ("temprature", "unknown_field")
        assert "'temperature'" in error["message"]

    with_client(counted)
    with_client(refused, unknown_fields="refuse")


def test_the_last_of_two_equal_keys_counts() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        body = b'{"prompt": [97], "max_tokens": 1, "max_tokens": 3}'
        response = await client.post(COMPLETIONS, content=body, headers=JSON)
        assert response.json()["usage"]["completion_tokens"] == 3

    with_client(test)


def test_more_texts_than_the_queue_takes() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        error_of(await client.post(COMPLETIONS, json=completion(["a"] * 9)))
        error_of(await client.post(COMPLETIONS, json=completion("a", n=9)))
        error_of(await client.post(CHAT, json=chat("a", n=9)))
        await check_alive(client)

    with_client(test, max_queue=8)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = st.sampled_from([name for name, _, _ in BAD_FIELDS] + ["messages", "prompt", "echo"])
MORE = st.sampled_from(
    ["logprobs", "top_logprobs", "tools", "chat_template_kwargs", "best_of", "bad_words"]
)


@settings(max_examples=150, deadline=None)
@given(
    path=st.sampled_from([CHAT, COMPLETIONS]),
    fields=st.dictionaries(FIELDS | MORE, ANYTHING, max_size=4),
)
def test_no_request_is_an_internal_error(path: str, fields: dict[str, Any]) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        base = {**(chat() if path == CHAT else completion()), "max_tokens": 3, **fields}
        response = await client.post(path, content=json.dumps(base), headers=JSON)
        if response.status_code != 200:
            assert response.status_code in (400, 404), response.text
            error_of(response, response.status_code)
        await check_alive(client)

    with_client(test)


def test_an_unexpected_error_tells_no_details(caplog: pytest.LogCaptureFixture) -> None:
    import asyncio

    class Broken(EchoEngine):
        def generate(self, request: Any) -> Any:
            raise KeyError("a secret of the inside")

    async def main() -> None:
        async with client_of(make_server(Broken())) as client:
            response = await client.post(COMPLETIONS, json=completion())
            assert error_of(response, 500)["code"] == "internal_error"
            assert "secret" not in response.text

    asyncio.run(main())
    assert "a secret of the inside" in caplog.text, "but the log has them"
