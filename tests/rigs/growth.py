"""What a request costs as it gets longer: CPU time at 4n beside that at n, for all that a client
can make long. More than six times as much is more than linear."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
from tests.server.fakes import CHAT, COMPLETIONS, EchoEngine, client_of, make_server

from vllm_di import LLM, SamplingParams
from vllm_di.components.chat_template.conversation import lost_user_text
from vllm_di.components.interfaces import Tokenizer
from vllm_di.errors import VllmDiError
from vllm_di.frontend.detokenizer import Detokenizer, StopStrings
from vllm_di.frontend.requests import bad_words_token_ids
from vllm_di.server import protocol

MOST_GROWTH = 6.0
ROUNDS = 5
ENOUGH = 0.005
"""Seconds of CPU at n, beside which the clock's grain is small."""
NEGLIGIBLE = 0.02
"""Seconds at the longest that the bounds allow, below which growth does not matter."""
BODY_LIMIT = 6 << 20
"""Bytes: below ``server.max_body_bytes``."""

Work = Callable[[int], None]


@dataclass
class Case:
    """``make(n)`` gives the work to be timed; n goes no further than ``most``, where the request
    models have a bound."""

    name: str
    make: Callable[[int], Callable[[], object]]
    most: int
    first: int = 64


@dataclass
class Growth:
    name: str
    n: int
    small: float
    large: float
    bounded: bool
    """The bound came before the time was worth measuring."""

    @property
    def factor(self) -> float:
        return self.large / max(self.small, 1e-9)

    @property
    def good(self) -> bool:
        return self.factor <= MOST_GROWTH or (self.bounded and self.large < NEGLIGIBLE)

    def __str__(self) -> str:
        note = "" if self.good else "   MORE THAN LINEAR"
        return (
            f"{self.name:44} n={self.n:>8,}  {1e3 * self.small:8.2f} ms  "
            f"4n {1e3 * self.large:8.2f} ms  x{self.factor:.1f}{note}"
        )


def measure(case: Case) -> Growth:
    """Best of five at n and at 4n; n grows until it takes long enough, or to its bound."""
    n = min(case.first, case.most // 4)
    while True:
        small = _best(case.make(n), 1)
        if small >= ENOUGH or n * 4 >= case.most:
            break
        n = min(n * 4, case.most // 4)
    works = case.make(n), case.make(4 * n)
    small, large = (_best(work, ROUNDS) for work in works)
    return Growth(case.name, n, small, large, small < ENOUGH)


def _best(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


# -- the API process ------------------------------------------------------------------------------


def of_bodies() -> Iterator[Case]:
    """Whole requests through the server's application, round an engine that echoes."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    plain: dict[str, Any] = {"prompt": "hi", "max_tokens": 1}

    def field(path: str, name: str, value: Callable[[int], Any], most: int) -> Case:
        base = chat if path == CHAT else plain if path == COMPLETIONS else {}

        def make(n: int) -> Callable[[], object]:
            return posted(path, json.dumps({**base, name: value(n)}).encode())

        return Case(f"{path} {name}", make, most)

    def raw(name: str, body: Callable[[int], bytes], most: int = BODY_LIMIT) -> Case:
        return Case(f"body: {name}", lambda n: posted(COMPLETIONS, body(n)), most)

    ids = [97, 98, 99]
    yield field(COMPLETIONS, "prompt", lambda n: "a b" * n, BODY_LIMIT // 3)
    yield field(COMPLETIONS, "prompt", lambda n: [ids[i % 3] for i in range(n)], 2**20)
    yield field(COMPLETIONS, "prompt", lambda n: ["a"] * n, 1024)
    yield field(COMPLETIONS, "allowed_token_ids", lambda n: [ids[i % 3] for i in range(n)], 2**18)
    yield field(COMPLETIONS, "stop_token_ids", lambda n: [ids[i % 3] for i in range(n)], 1024)
    yield field(COMPLETIONS, "logit_bias", lambda n: {str(i % 290): 1 for i in range(n)}, 4096)
    yield field(COMPLETIONS, "bad_words", lambda n: [f"{'a' * 120}{i}" for i in range(n)], 256)
    yield field(COMPLETIONS, "stop", lambda n: "a" * n, 1024)
    yield field(COMPLETIONS, "guided_json", lambda n: {"a": [1] * n}, BODY_LIMIT // 3)
    yield field(COMPLETIONS, "unknown", lambda n: "x" * n, BODY_LIMIT)
    yield field(CHAT, "messages", lambda n: [{"role": "user", "content": "a"}] * n, 16_384)
    yield field(CHAT, "messages", lambda n: [{"role": "user", "content": "a" * n}], BODY_LIMIT)
    yield field(
        CHAT,
        "messages",
        lambda n: [{"role": "user", "content": [{"type": "text", "text": "a"}] * n}],
        BODY_LIMIT // 40,
    )
    yield field(
        CHAT,
        "messages",
        lambda n: [
            {
                "role": "assistant",
                "tool_calls": [{"function": {"arguments": "[" + "1," * n + "1]"}}],
            }
        ],
        BODY_LIMIT // 3,
    )
    yield field(CHAT, "tools", lambda n: [{"type": "function"}] * n, 1024)
    item = {"role": "assistant", "content": "a" * 300}

    def spoken(n: int) -> Callable[[], object]:
        return posted("/v1/responses", json.dumps({"input": [item] * n}).encode())

    yield Case("/v1/responses input", spoken, 16_384, first=4096)
    yield Case(f"{CHAT} allowed_tools", lambda n: posted(CHAT, _allowed_tools(chat, n)), 100_000)
    yield field(CHAT, "chat_template_kwargs", lambda n: {f"k{i}": 1 for i in range(n)}, 300_000)
    yield field("/tokenize", "prompt", lambda n: "a b" * n, BODY_LIMIT // 3)
    yield field("/detokenize", "tokens", lambda n: [ids[i % 3] for i in range(n)], 2**20)
    yield raw(
        "unknown fields", lambda n: b"{%b}" % b",".join(b'"k%d":1' % i for i in range(n)), 2**19
    )
    yield raw("one key, again and again", lambda n: b"{%b}" % b",".join([b'"n":1'] * n), 2**20)
    yield raw("brackets in pairs", lambda n: b'{"x":[%b[]]}' % (b"[]," * n), 2**21)
    yield raw("brackets open", lambda n: b"[" * n)
    yield raw("a string without an end", lambda n: b"[" * 65 + b'"' + b'\\"' * n, 2**21)
    yield raw("backslashes", lambda n: b"[" * 65 + b'"' + b"\\" * n)
    yield raw("quotes", lambda n: b"[" * 65 + b'"' * n)
    yield raw("blanks", lambda n: b" " * n)
    yield raw("digits", lambda n: b'{"seed":' + b"9" * n + b"}")
    yield raw("digits of a fraction", lambda n: b'{"top_p":0.' + b"9" * n + b"}")
    yield raw("escapes", lambda n: b'{"prompt":"' + b"\\u0061" * n + b'"}', 2**19)


def _allowed_tools(chat: dict[str, Any], n: int) -> bytes:
    """The last of many tools, n times."""
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(1024)]
    allowed = {"mode": "auto", "tools": [tools[-1]] * n}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    return json.dumps({**chat, "tools": tools, "tool_choice": choice}).encode()


def of_addresses() -> Iterator[Case]:
    """Paths, queries and headers, as far as the HTTP parser lets them through."""
    paths: dict[str, Callable[[int], str]] = {
        "path": lambda n: "/v1/models/" + "a/" * n,
        "query": lambda n: "/version?" + "a=b&" * n,
        "escapes": lambda n: "/v1/models/" + "%2e" * n,
    }

    def addressed(path: Callable[[int], str]) -> Callable[[int], Callable[[], object]]:
        return lambda n: asked(path(n), {})

    for name, path in paths.items():
        yield Case(f"URL: {name}", addressed(path), 20_000)
    yield Case(
        "header: x-request-id", lambda n: asked("/version", {"x-request-id": "a." * n}), 30_000
    )
    yield Case(
        "header: authorization", lambda n: asked("/version", {"authorization": "B " * n}), 30_000
    )
    yield Case("header: host", lambda n: asked("/version", {"host": "a." * n}), 30_000)


def posted(path: str, body: bytes) -> Callable[[], object]:
    return _called("POST", path, body, {"content-type": "application/json"})


def asked(path: str, headers: dict[str, str]) -> Callable[[], object]:
    return _called("GET", path, b"", headers)


def _called(method: str, path: str, body: bytes, headers: dict[str, str]) -> Callable[[], object]:
    async def call() -> None:
        async with client_of(make_server(EchoEngine())) as client:
            response = await client.request(method, path, content=body, headers=headers)
            assert response.status_code < 500 or response.status_code == 503, response.text[:200]

    def work() -> None:
        with suppress(httpx.InvalidURL):
            asyncio.run(call())

    return work


# -- parts that a body reaches through an answer --------------------------------------------------


def of_texts(tokenizer: Tokenizer, name: str) -> Iterator[Case]:
    """Tokenizer, detokenizer and stop strings over long texts."""
    texts: dict[str, Callable[[int], str]] = {
        "words": lambda n: "the cat sat. " * (n // 13 + 1),
        "one letter": lambda n: "a" * n,
        "blanks": lambda n: " " * n,
        "newlines": lambda n: "\n" * n,
        "digits": lambda n: "1" * n,
        "marks": lambda n: "!?" * (n // 2),
        "CJK": lambda n: "\u4e16" * n,
        "emoji with joiners": lambda n: "\U0001f468\u200d" * (n // 2),
        "combining marks": lambda n: "e" + "\u0301" * n,
        "NULs": lambda n: "\0" * n,
        "special tokens": lambda n: "<|im_start|>" * (n // 12 + 1),
    }

    def encoded(text: Callable[[int], str]) -> Callable[[int], Callable[[], object]]:
        return lambda n: partial(tokenizer.encode, text(n))

    for kind, text in texts.items():
        yield Case(f"{name} encode: {kind}", encoded(text), 2**20, first=4096)
    for kind in ("words", "CJK", "blanks", "emoji with joiners"):

        def fed(n: int, text: Callable[[int], str] = texts[kind]) -> Callable[[], object]:
            ids = tokenizer.encode(text(n))

            def work() -> None:
                detokenizer = Detokenizer(tokenizer)
                for i in ids:
                    detokenizer.add(i)
                detokenizer.flush()

            return work

        yield Case(f"{name} detokenize: {kind}", fed, 2**16, first=256)
    for char in (0x80, 0xE2, 0xF0):

        def broken(n: int, char: int = char) -> Callable[[], object]:
            ids = [
                i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([char])
            ]

            def work() -> None:
                detokenizer = Detokenizer(tokenizer)
                for i in ids[:1] * n:
                    detokenizer.add(i)
                detokenizer.flush()

            return work

        yield Case(f"{name} detokenize: byte {char:#x} alone", broken, 2**16, first=256)
    yield Case(
        f"{name} bad words",
        lambda n: lambda: bad_words_token_ids(tokenizer, [f"{'a' * 120}{i}" for i in range(n)]),
        1024,
    )


def of_prompts() -> Iterator[Case]:
    """The look for the last message's texts in the prompt."""

    def looked(write: Callable[[str], str]) -> Callable[[int], Callable[[], object]]:
        def make(n: int) -> Callable[[], object]:
            texts = [f'"{i:06d}' for i in range(n)]
            parts = [{"type": "text", "text": text} for text in texts]
            prompt = " ".join(map(write, texts))
            return lambda: lost_user_text([{"role": "user", "content": parts}], prompt)

        return make

    yield Case("texts of a message", looked(str), 200_000)
    yield Case("texts of a message, as JSON", looked(json.dumps), 200_000)


def of_stop_strings() -> Iterator[Case]:
    def searched(
        stops: list[str], text: Callable[[int], str]
    ) -> Callable[[int], Callable[[], object]]:
        def make(n: int) -> Callable[[], object]:
            shown = text(n)

            def work() -> None:
                search = StopStrings(stops)
                for char in shown:
                    search.add(char)

            return work

        return make

    yield Case(
        "stop strings: nearly all matched",
        searched(["a" * 1023 + "b"] * 16, lambda n: "a" * n),
        2**16,
    )
    yield Case(
        "stop strings: matched and let go",
        searched(
            [("a" * i + "b") for i in range(900, 916)], lambda n: ("a" * 899 + "c") * (n // 900 + 1)
        ),
        2**16,
        first=1024,
    )
    yield Case(
        "depth check alone",
        lambda n: lambda: _refused(b"[" * 65 + b'"\\"' * n),
        2**21,
    )


def _refused(body: bytes) -> None:
    with suppress(VllmDiError):
        protocol._check_depth(body, 64)


# -- the engine -----------------------------------------------------------------------------------


def of_engine(llm: LLM) -> Iterator[Case]:
    """Whole requests on a tiny model in this process."""

    def generated(prompt: list[int], **params: Any) -> Callable[[], object]:
        chosen = SamplingParams(**({"max_tokens": 2, "ignore_eos": True, "seed": 1} | params))
        return lambda: llm.generate(prompt, chosen)

    yield Case("engine: prompt", lambda n: generated([1] * n), 2000)
    yield Case("engine: answer", lambda n: generated([1], max_tokens=n), 2000, first=32)
    yield Case(
        "engine: answer with log-probabilities",
        lambda n: generated([1], max_tokens=n, logprobs=5),
        2000,
        first=32,
    )
    yield Case(
        "engine: answer with penalties",
        lambda n: generated([1], max_tokens=n, presence_penalty=1),
        2000,
        first=32,
    )
    yield Case(
        "engine: prompt log-probabilities", lambda n: generated([1] * n, prompt_logprobs=5), 2000
    )
    yield Case("engine: n", lambda n: generated([1] * 64, n=n), 128, first=4)
    yield Case(
        "engine: allowed_token_ids",
        lambda n: generated([1], allowed_token_ids=[i % 250 for i in range(n)]),
        2**18,
    )
    yield Case("engine: stop_token_ids", lambda n: generated([1], stop_token_ids=[250] * n), 1024)
    yield Case(
        "engine: logit_bias", lambda n: generated([1], logit_bias=dict.fromkeys(range(n), 0.5)), 300
    )

    def words(n: int) -> list[str]:
        return [f"{'a' * 120}{i}" for i in range(n)]

    yield Case(
        "engine: bad_words", lambda n: generated([1], bad_words=words(n), max_tokens=64), 256
    )
    yield Case(
        "engine: stop", lambda n: generated([1], stop=["\x01" * n] * 16, max_tokens=64), 1024
    )
    yield Case(
        "engine: allowed_token_ids x n",
        lambda n: generated([1], n=n, allowed_token_ids=list(range(250))),
        128,
        first=4,
    )


def all_cases(llm: LLM, tokenizers: dict[str, Tokenizer]) -> Iterator[Case]:
    yield from of_bodies()
    yield from of_addresses()
    for name, tokenizer in tokenizers.items():
        yield from of_texts(tokenizer, name)
    yield from of_prompts()
    yield from of_stop_strings()
    yield from of_engine(llm)
