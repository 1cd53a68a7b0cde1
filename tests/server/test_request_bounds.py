"""Every field of every request: lists have bounds, numbers of any size are answered with 200 or
4xx, and a body is scanned once."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import httpx
import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.server.fakes import CHAT, COMPLETIONS, EchoEngine, chat, completion, with_client
from tests.server.test_bad_input import JSON, check_alive, error_of

from vllm_di.errors import RequestError
from vllm_di.server import protocol
from vllm_di.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
)

BASES: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
    CHAT: (ChatRequest, chat(max_tokens=3)),
    COMPLETIONS: (CompletionRequest, completion(max_tokens=3)),
    "/tokenize": (TokenizeRequest, {"prompt": "x"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [97]}),
}
KINDS: list[type[msgspec.Struct]] = [*(kind for kind, _ in BASES.values()), StreamOptions]


def unbounded(hint: Any, bounded: bool = False) -> Iterator[str]:
    """Lists and dicts in a type without a ``max_length``; ``dict[str, Any]`` is JSON that goes on
    as it came, which the body's length and depth bound."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *metas = get_args(hint)
        yield from unbounded(inner, any(getattr(m, "max_length", None) for m in metas))
    elif origin in (Union, types.UnionType):
        for part in get_args(hint):
            yield from unbounded(part)
    elif origin in (list, dict):
        if not bounded and hint != dict[str, Any]:
            yield str(hint)
        for part in get_args(hint):
            yield from unbounded(part)


def test_every_list_has_a_bound() -> None:
    for kind in KINDS:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            assert list(unbounded(hint)) == [], f"{kind.__name__}.{name} has no max_length"
    assert list(unbounded(list[int] | None)) == ["list[int]"], "the walk finds what it is to find"


NUMBERS = (
    *("0", "-0.0", "1", "-1", "5.0", "1.5", "-5.0", "1e2", "1e-300", "5e-324", "1e-45", "-5e-324"),
    *("1e-7", "1e38", "3.5e38", "1e300", "1e308", "-1e308", "1e309", "-1e309", "1e20"),
    *("2147483647", "2147483648", "-2147483649", "9223372036854775807", "9223372036854775808"),
    *("-9223372036854775808", "-9223372036854775809", "1" + "0" * 400, "NaN", "Infinity"),
    *("-Infinity", "true", "false", '"5"', '"x"', "null", "[]", "{}", "[5.0]", "[1e308]"),
    *("[-1]", "[9223372036854775807]", "[true]", '{"97": 5e-324}', '{"97": 1e308}'),
    *('{"97.0": 1}', '{"9223372036854775808": 1}', '{"97": true}'),
)


@pytest.mark.parametrize("path", BASES)
def test_numbers_of_any_size_in_any_field(path: str) -> None:
    kind, base = BASES[path]

    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        for name in kind.__struct_fields__:
            for number in NUMBERS:
                body = json.dumps({**base, name: "?"}).replace('"?"', number)
                response = await client.post(path, content=body, headers=JSON)
                if response.status_code != 200:
                    assert response.status_code in (400, 404), (name, number, response.text)
                    error = error_of(response, response.status_code)
                    where = error["param"] or error["code"] == "invalid_json"
                    assert where, (name, number, error)
        await check_alive(client)

    with_client(test)


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("max_tokens", "2.0", 2),
        ("top_k", "5e0", 5),
        ("seed", "-7.0", -7),
        ("n", "1.0", 1),
        ("allowed_token_ids", "[97.0, 98]", [97, 98]),
    ],
)
def test_integral_floats_are_integers(name: str, number: str, expected: Any) -> None:
    body = json.dumps({**completion(), name: "?"}).replace('"?"', number).encode()
    request, unknown = protocol.decode(body, CompletionRequest, max_depth=64)
    assert not unknown
    value = getattr(request, name)
    assert value == expected
    assert all(type(v) is int for v in (value if isinstance(value, list) else [value]))


@pytest.mark.parametrize("name", protocol.REFUSED)
def test_what_cannot_be_honoured_is_refused_at_zero_too(name: str) -> None:
    kind = CompletionRequest if hasattr(CompletionRequest, name) else ChatRequest
    base = completion() if kind is CompletionRequest else chat()
    for value in (0, 0.0, 1):
        with pytest.raises(RequestError):
            _params(kind, {**base, name: value})
    for nothing in (None, False):
        _params(kind, {**base, name: nothing})


def _params(kind: type[Any], body: dict[str, Any]) -> None:
    request, _ = protocol.decode(json.dumps(body).encode(), kind, max_depth=9)
    protocol.sampling_params(request, logprobs=None, max_tokens=1, defaults={})


@pytest.mark.parametrize("value", ["1.5", "1e300", '"5"', "true"])
def test_what_is_no_integer_is_refused(value: str) -> None:
    body = json.dumps({**completion(), "top_k": "?"}).replace('"?"', value).encode()
    with pytest.raises(RequestError) as caught:
        protocol.decode(body, CompletionRequest, max_depth=64)
    assert caught.value.param == "top_k"


def test_what_goes_to_the_engine_as_it_came_can_be_sent() -> None:
    for name in ("guided_json", "guided_regex", "guided_choice", "response_format"):
        value = {"type": "json_schema", "x": [{"deep": 2**64}]}
        body = json.dumps({**completion(), name: value}).encode()
        request, _ = protocol.decode(body, CompletionRequest, max_depth=64)
        with pytest.raises(RequestError, match="more than 64 bits") as caught:
            protocol.sampling_params(request, logprobs=None, max_tokens=1, defaults={})
        assert caught.value.param == name


# -- depth ----------------------------------------------------------------------------------------


def deepest(body: bytes) -> int | None:
    """Nesting, one character at a time. None for a backslash outside a string, where every parser
    stops."""
    depth = most = 0
    inside = escaped = False
    for char in body.decode("latin-1"):
        if inside:
            inside = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            inside = True
        elif char == "\\":
            return None
        elif char in "[{":
            depth += 1
            most = max(most, depth)
        elif char in "]}":
            depth -= 1
    return most


@given(st.text(alphabet='[]{}"\\a', max_size=80), st.integers(1, 6))
def test_depth_is_counted_outside_strings(text: str, limit: int) -> None:
    body = text.encode()
    expected = deepest(body)
    assume(expected is not None)
    try:
        protocol._check_depth(body, limit)
        refused = False
    except RequestError:
        refused = True
    assert refused == ((expected or 0) > limit)


def test_depth_is_counted_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_PIECE", 3)
    for count in (6, 7):
        body = b"[" * count + b"]" * count
        if count <= 6:
            protocol._check_depth(body, 6)
        else:
            with pytest.raises(RequestError, match="deeper than 6"):
                protocol._check_depth(body, 6)


class Watched(bytes):
    """Counts what is cut from it and replaced in it."""

    cuts: int

    def __getitem__(self, key: Any) -> Any:
        self.cuts += len(range(*key.indices(len(self))))
        return bytes.__getitem__(self, key)

    def replace(self, *args: Any) -> Watched:
        found = Watched(bytes.replace(self, *args))
        found.cuts = self.cuts
        watched.append(found)
        return found


watched: list[Watched] = []


@pytest.mark.parametrize("unit", [b'\\"', b"\\", b"a", b"\\\\", b"[]", b'"', b'"\\"'])
def test_each_byte_is_looked_at_once(unit: bytes) -> None:
    """Also where a string has no end: a search that fails at one quote would begin again at the
    next."""
    watched.clear()
    body = Watched(b"[]" * 10 + b'"' + unit * 100_000)
    body.cuts = 0
    protocol._check_depth(body, 6)
    cuts = sum(w.cuts for w in watched)
    assert 20 <= cuts <= len(body) + protocol._PIECE


def test_a_body_with_two_lengths_is_refused_and_ends_its_connection() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        two = {**JSON, "transfer-encoding": "chunked", "content-length": "2"}
        response = await client.post(COMPLETIONS, content=b"{}", headers=two)
        assert error_of(response)["code"] == "invalid_http"
        assert response.headers["connection"] == "close"

    with_client(test)
