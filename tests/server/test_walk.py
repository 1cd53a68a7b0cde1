"""Over raw sockets: each route in many spellings, each refusal of the server and of its parser.
Whatever fails has a body in OpenAI's form."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from tests.server.fakes import (
    CHAT,
    COMPLETIONS,
    EchoEngine,
    client_of,
    completion,
    make_server,
)
from tests.server.test_auth import PATHS, spellings
from tests.server.test_connections import connect, error_of, is_well, read_to_end
from tests.server.test_live import Live

from vllm_di.server.auth import OPEN_PATHS

JSON = b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with Live(max_body_bytes=2048) as live:
        yield live


def request(line: bytes, headers: bytes = b"Host: localhost\r\n", body: bytes = b"") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    return line + b" HTTP/1.1\r\n" + headers + length + b"Connection: close\r\n\r\n" + body


def ask(live: Live, data: bytes) -> bytes:
    with connect(live) as connection:
        connection.sendall(data)
        return read_to_end(connection)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


HOST = b"Host: localhost\r\n"
POST = b"POST " + COMPLETIONS.encode()
SOME = json.dumps(completion(max_tokens=1)).encode()
REFUSED: list[tuple[str, int, bytes]] = [
    ("no HTTP", 400, b"hello\r\n\r\n"),
    ("TLS", 400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32) + b"\r\n\r\n"),
    ("HTTP/2", 505, b"PRI * HTTP/2.0\r\n\r\n"),
    ("version", 505, b"GET /livez HTTP/9.9\r\nHost: localhost\r\n\r\n"),
    ("space in the target", 400, b"GET /li vez HTTP/1.1\r\n\r\n"),
    ("bytes in the target", 400, b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    ("no host", 400, b"GET /livez HTTP/1.1\r\n\r\n"),
    ("two hosts", 400, request(b"GET /livez", HOST + b"Host: other\r\n")),
    ("header without a name", 400, request(b"GET /livez", HOST + b": x\r\n")),
    ("header without a colon", 400, request(b"GET /livez", HOST + b"nothing\r\n")),
    ("space before the colon", 400, request(b"GET /livez", HOST + b"A : x\r\n")),
    ("folded first header", 400, request(b"GET /livez", b" x: y\r\n" + HOST)),
    ("NUL in a header", 400, request(b"GET /livez", HOST + b"A: \x00\r\n")),
    ("length that is no number", 400, request(POST, HOST + JSON + b"Content-Length: ten\r\n")),
    ("negative length", 400, request(POST, HOST + JSON + b"Content-Length: -1\r\n")),
    (
        "two lengths",
        400,
        request(POST, HOST + JSON + b"Content-Length: 1\r\nContent-Length: 2\r\n"),
    ),
    ("coding", 501, request(POST, HOST + JSON + b"Transfer-Encoding: gzip, chunked\r\n")),
    ("bad chunk", 400, request(POST, HOST + JSON + b"Transfer-Encoding: chunked\r\n", b"zz\r\nx")),
    ("long line", 431, request(b"GET /" + b"x" * 100_000)),
    ("long header", 431, request(b"GET /livez", HOST + b"A: " + b"x" * 100_000 + b"\r\n")),
    ("many headers", 431, request(b"GET /livez", HOST + b"A: b\r\n" * 20_000)),
    ("foreign host", 421, request(b"GET /livez", b"Host: evil.example\r\n")),
    ("unknown path", 404, request(b"GET /nothing")),
    ("asterisk", 404, request(b"OPTIONS *")),
    ("authority", 404, request(b"CONNECT localhost:80")),
    ("unknown model", 404, request(b"GET /v1/models/none")),
    ("method", 405, request(b"DELETE " + CHAT.encode())),
    ("unknown method", 405, request(b"BREW /livez")),
    ("no type", 415, request(POST, HOST, SOME)),
    ("other type", 415, request(POST, HOST + b"Content-Type: text/plain\r\n", SOME)),
    *(
        (name, 415, request(POST, HOST + JSON + f"Content-Encoding: {name}\r\n".encode(), SOME))
        for name in ("gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip")
    ),
    ("long body", 413, request(POST, HOST + JSON, b" " * 4096)),
    ("no JSON", 400, request(POST, HOST + JSON, b"{")),
    (
        "no such model",
        404,
        request(POST, HOST + JSON, json.dumps(completion() | {"model": "x"}).encode()),
    ),
]


@pytest.mark.parametrize(("status", "data"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_each_refusal_has_openais_form(live: Live, status: int, data: bytes) -> None:
    answer = ask(live, data)
    assert error_of(answer)[0] == status, answer
    assert is_well(live)


def test_a_bad_request_behind_a_good_one(live: Live) -> None:
    good = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    first, _, second = ask(live, good + b"hello\r\n\r\n").partition(b"}")
    assert status_of(first) == 200
    assert error_of(second)[0] == 400


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/livez", 200),
        ("HTTP://LocalHost:80/livez?x=y", 200),
        ("https://127.0.0.1/v1/models", 200),
        ("http://user:secret@[::1]:8000/v1/models/echo", 200),
        ("http://localhost", 200),  # the page
        ("http://localhost/nothing", 404),
        ("http://evil.example/livez", 421),
        ("http://[bad/livez", 421),
        ("http:///livez", 421),
        ("ftp://localhost/livez", 404),
        ("/http://localhost/livez", 404),
        ("http%3a//localhost/livez", 404),
    ],
)
def test_absolute_targets(live: Live, target: str, status: int) -> None:
    answer = ask(live, request(b"GET " + target.encode()))
    assert status_of(answer) == status, answer
    if status >= 400:
        error_of(answer)


def test_encodings_that_change_nothing(live: Live) -> None:
    for encoding in (b"identity", b"Identity", b""):
        headers = HOST + JSON + b"Content-Encoding: " + encoding + b"\r\n"
        assert status_of(ask(live, request(POST, headers, SOME))) == 200


TRICKS = ["/{}", "//{}", "/./{}", "/x/../{}", "/%2e/{}", "/{}/", "/{}%20", "/{};x", "/{}%0d%0a"]


def test_without_a_key_every_spelling_is_closed(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    with (
        Live(api_key_file=str(keys)) as live,
        connect(live) as connection,
        connection.makefile("rb") as file,
    ):

        def ask(method: str, target: str, host: str) -> tuple[int, dict[str, Any]]:
            """On one connection, which must outlive all of them."""
            head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n\r\n"
            connection.sendall(head.encode())
            status = int(file.readline().split()[1])
            length = 0
            while (line := file.readline()) != b"\r\n":
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            return status, json.loads(file.read(length) or b"{}")

        closed = 0
        for path in [*PATHS, "/nothing", "/"]:
            own = {path.upper(), path.title(), *(t.format(path[1:]) for t in TRICKS)}
            own |= {s.partition("#")[0] for s in spellings(path)}
            targets = [*own, *(f"http://localhost{s}" for s in own)]
            for target, host in itertools.product(sorted(targets), ("localhost", "health")):
                absolute = target.startswith("http:")
                seen = urlsplit(target).path or "/" if absolute else target.partition("?")[0]
                if unquote(seen) in OPEN_PATHS:  # what routing sees
                    continue
                status, body = ask("GET", target, host)
                assert status == 401, target
                assert body["error"]["type"] == "authentication_error"
                closed += 1
        assert closed > 800
        assert not live.engine.requests


@pytest.mark.parametrize(
    ("settings", "host", "is_allowed"),
    [
        ({}, "localhost", True),
        ({}, "LOCALHOST:8000", True),
        ({}, "localhost.", True),
        ({}, "127.0.0.1:1", True),
        ({}, "127.9.9.9", True),
        ({}, "[::1]:80", True),
        ({}, "evil.example", False),
        ({}, "localhost.evil.example", False),
        ({}, "127.0.0.1.evil.example", False),
        ({}, "10.0.0.1", False),
        ({}, "0.0.0.0", False),
        ({}, "", False),
        ({"allowed_hosts": ["My.Box"]}, "my.box:80", True),
        ({"allowed_hosts": ["my.box"]}, "localhost", True),
        ({"allowed_hosts": ["my.box"]}, "other.box", False),
        ({"host": "0.0.0.0", "insecure": True}, "other.box", True),
        ({"host": "0.0.0.0", "insecure": True, "allowed_hosts": ["a"]}, "b", False),
        ({"api_key_file": "keys"}, "other.box", True),
        ({"unix_socket": "s"}, "other.box", True),
    ],
)
def test_hosts(settings: dict[str, Any], host: str, is_allowed: bool, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-key\n")
    if "api_key_file" in settings:
        settings = {"api_key_file": str(tmp_path / "keys")}

    async def main() -> None:
        headers = {"host": host, "authorization": "Bearer a-key"}
        async with client_of(make_server(EchoEngine(), **settings), headers=headers) as client:
            answer = await client.get("/v1/models")
            assert answer.status_code == (200 if is_allowed else 421)
            if not is_allowed:
                error = answer.json()["error"]
                assert error["code"] == "host_not_allowed"
                assert "server.allowed_hosts" in error["message"]

    asyncio.run(main())
