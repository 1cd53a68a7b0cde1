"""Random bodies for every route: right ones, right ones with wrong values, broken JSON."""

from __future__ import annotations

import json
import random
from typing import Any

from vllm_di.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

ROUTES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
NUMBERS = (
    *("0", "1", "2", "3", "-1", "5.0", "1.5", "0.5", "-0.0", "1e-300", "5e-324", "1e-45", "1e-6"),
    *(
        "1e38",
        "1e308",
        "1e309",
        "1e20",
        "2147483648",
        "9223372036854775807",
        "-9223372036854775808",
    ),
    *("18446744073709551616", "9" * 400, "NaN", "Infinity", "-Infinity", "100", "-2", "16", "128"),
)
_PLAIN = ("", " ", "a", "hello", "\u0000", "\u2028", "é" * 40, "\U0001f600", "a" * 2000, "<0xE2>")
TEXTS = (*_PLAIN, "{{ x }}", "{% for %}", "</s>", "\\ud800", "\ufffd", '"]}', "../../etc", "stop")


def case(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body."""
    path = rng.choice(list(ROUTES))
    fields = _right(rng, path)
    for _ in range(rng.choice((0, 0, 0, 1, 1, 1, 2, 6))):
        names = list(ROUTES[path].__struct_fields__)
        fields[rng.choice(names) if rng.random() < 0.95 else _text(rng)] = _value(rng, 0)
    _tame(fields, rng)
    body = _encode(fields, rng).encode("utf-8", "surrogatepass")
    return path, _broken(rng, body) if rng.random() < 0.15 else body


def _right(rng: random.Random, path: str) -> dict[str, Any]:
    """A request that can be answered."""
    if path == "/detokenize":
        return {"tokens": [rng.randrange(256) for _ in range(rng.randrange(1, 30))]}
    text = rng.choice(("hello", "a b c", "é\u4e16", "x" * 50))
    if path == "/tokenize":
        return {"prompt": text} if rng.random() < 0.7 else {"messages": [_message(rng, text)]}
    fields: dict[str, Any] = {"max_tokens": rng.randrange(1, 5)}
    options: dict[str, Any] = {
        "temperature": rng.choice((0, 0.7, 1.5)),
        "n": rng.choice((1, 2, 3)),
        "top_k": rng.choice((-1, 0, 1, 50)),
        "top_p": rng.choice((0.1, 0.9, 1)),
        "min_p": rng.choice((0, 0.1, 1)),
        "seed": rng.randrange(-(2**63), 2**63),
        "repetition_penalty": rng.choice((0.5, 1, 2, 0.01, 100)),
        "presence_penalty": rng.choice((-2, 0, 2)),
        "frequency_penalty": rng.choice((-2, 0, 2)),
        "logit_bias": {str(rng.randrange(256)): rng.choice((-100, 0.5, 100))},
        "stop": rng.choice(("a", ["a", "bb"], [])),
        "stop_token_ids": [rng.randrange(256)],
        "allowed_token_ids": [rng.randrange(256) for _ in range(rng.randrange(1, 9))],
        "bad_words": rng.choice((["a"], ["a", "ab", "abc"])),
        "min_tokens": rng.randrange(3),
        "prompt_logprobs": rng.choice((0, 3)),
        "stream": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "return_token_ids": True,
        "cache_salt": "salt",
        "priority": rng.randrange(-3, 3),
    }
    for name in rng.sample(list(options), rng.randrange(6)):
        fields[name] = options[name]
    if path == "/v1/completions":
        prompts = (text, [text, text], [1, 2, 3], [[1, 2], [3]])
        fields |= {"prompt": rng.choice(prompts), "logprobs": rng.choice((None, 0, 5))}
        if rng.random() < 0.2:
            fields |= {"echo": True}
    else:
        fields["messages"] = [_message(rng, text) for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.2:
            fields |= {"logprobs": True, "top_logprobs": 3}
    return fields


def _message(rng: random.Random, text: str) -> dict[str, Any]:
    content: Any = rng.choice((text, [{"type": "text", "text": text}], text))
    return {"role": rng.choice(("user", "system", "assistant")), "content": content}


class _Raw(str):
    """A number that goes into the JSON as it is written."""


def _value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 3:
        return _Raw(rng.choice(NUMBERS))
    if kind == 3:
        return _text(rng)
    if kind == 4:
        return rng.choice((None, True, False))
    if kind == 5:
        return rng.choice(([], {}, "none", "auto", {"type": "json_object"}, {"type": "text"}))
    size = rng.choice((0, 1, 2, 3, 40)) if depth == 0 else rng.randrange(3)
    if kind == 6:
        return [_value(rng, depth + 1) for _ in range(size)]
    names = ("role", "content", "type", "text", "function", "name", "arguments", "1", "97", "x")
    return {rng.choice(names): _value(rng, depth + 1) for _ in range(size)}


def _text(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return rng.choice(TEXTS)
    return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0xD7FF)))) for _ in range(9))


def _tame(fields: dict[str, Any], rng: random.Random) -> None:
    """Long answers would take the rig's time: most stay short."""
    if rng.random() < 0.98:
        for name in ("max_tokens", "max_completion_tokens"):
            if name in fields and fields[name] is None:
                fields[name] = 2
        if not isinstance(fields.get("max_tokens", 2), int):
            fields["max_completion_tokens"] = 2


def _encode(value: Any, rng: random.Random) -> str:
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, dict):
        inner = (f"{json.dumps(k)}:{_encode(v, rng)}" for k, v in value.items())
        return "{" + ",".join(inner) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_encode(v, rng) for v in value) + "]"
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def _broken(rng: random.Random, body: bytes) -> bytes:
    """A byte or two changed, an end cut off, something put in, nested deeply, or no JSON at all."""
    kind = rng.randrange(6)
    place = rng.randrange(len(body))
    if kind == 0:
        return body[:place]
    if kind == 1:
        return body[:place] + bytes([rng.randrange(256)]) + body[place + 1 :]
    if kind == 2:
        return body[:place] + rng.choice((b'"', b"\\", b"\x00", b"\xff", b"[", b"}")) + body[place:]
    if kind == 3:
        deep = rng.choice((60, 64, 70, 5000))
        return body[:-1] + b',"deep":' + b"[" * deep + b"]" * rng.choice((deep, 0)) + b"}"
    if kind == 4:
        return rng.randbytes(rng.randrange(200))
    return b"[" * rng.randrange(200) + b'"' + b'\\"' * rng.randrange(2000)
