"""Raw bytes on a socket: what is no HTTP, nearly HTTP, or HTTP that two readers would read
differently."""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass

BODY = b'{"prompt":"a","max_tokens":1}'
PATH = b"/v1/completions"
HOST = b"host: 127.0.0.1\r\n"
KIND = b"content-type: application/json\r\n"
HIDDEN = b"GET /version HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
SILENCE = 0.25
"""Seconds without a byte after which an answer counts as complete."""
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


@dataclass
class RawCase:
    """Pieces to send, and how many requests they may be at most."""

    name: str
    pieces: list[bytes]
    most: int = 1
    half_close: bool = False


def post(body: bytes, *, headers: bytes = b"", length: bytes | None = None) -> bytes:
    size = str(len(body)).encode() if length is None else length
    head = b"POST " + PATH + b" HTTP/1.1\r\n" + HOST + KIND
    return head + b"content-length: " + size + b"\r\n" + headers + b"\r\n" + body


def chunked(chunks: bytes, headers: bytes = b"transfer-encoding: chunked\r\n") -> bytes:
    return b"POST " + PATH + b" HTTP/1.1\r\n" + HOST + KIND + headers + b"\r\n" + chunks


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def _chunked(rng: random.Random) -> RawCase:
    size = rng.choice((1, 3, 7, 29))
    parts = b"".join(chunk(BODY[i : i + size]) for i in range(0, len(BODY), size))
    end = rng.choice((b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"", b"0\r\n"))
    broken = rng.choice(
        (parts, parts.replace(b"\r\n", b"\n"), b"-1\r\n", b"ffffffffffffffffff\r\n")
    )
    broken = rng.choice(
        (parts, broken, b"1;" + b"x" * 9000 + b"\r\na\r\n", b"zz\r\n", b" 3\r\nabc\r\n")
    )
    data = chunked(broken + end)
    cut = rng.randrange(len(data))
    return RawCase("chunked", [data[:cut], data[cut:]])


def _pipelined(rng: random.Random) -> RawCase:
    count = rng.randrange(2, 9)
    kinds = (post(BODY), HIDDEN, post(b"{"), post(BODY, headers=b"connection: close\r\n"))
    return RawCase("pipelined", [b"".join(rng.choice(kinds) for _ in range(count))], most=count)


def _smuggled(rng: random.Random) -> RawCase:
    """Two lengths: a second request must never be found in the first one's body."""
    te = rng.choice(
        (
            b"transfer-encoding: chunked\r\n",
            b"transfer-encoding : chunked\r\n",
            b"transfer-encoding: xchunked\r\n",
            b"transfer-encoding: chunked, identity\r\n",
            b"transfer-encoding:\tchunked\r\n",
            b"transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n",
            b"x: y\r\n transfer-encoding: chunked\r\n",
            b"Transfer-Encoding: CHUNKED\r\n",
        )
    )
    inner = b"0\r\n\r\n" + HIDDEN
    length = b"content-length: %d\r\n" % len(inner)
    both = [te, length]
    rng.shuffle(both)
    other = b"content-length: 3\r\ncontent-length: %d\r\n" % len(inner)
    headers = rng.choice((b"".join(both), b"".join(both), other))
    return RawCase("smuggled", [chunked(inner, headers)])


def _lengths(rng: random.Random) -> RawCase:
    lengths = (b"-1", b"+29", b"0x1d", b"29.0", b" 29", b"29,29", b"9" * 40, b"", b"2\x009", b"1e2")
    return RawCase("lengths", [post(BODY, length=rng.choice(lengths))], most=2)


def _bytes(rng: random.Random) -> RawCase:
    data = bytearray(post(BODY))
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return RawCase("changed bytes", [bytes(data)], most=2)


def _noise(rng: random.Random) -> RawCase:
    return RawCase("noise", [rng.randbytes(rng.randrange(1, 4000))], most=2)


def _bad_utf8(rng: random.Random) -> RawCase:
    bad = rng.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xe2\x28"))
    where = rng.randrange(3)
    if where == 0:
        return RawCase("bad UTF-8", [post(b'{"prompt":"' + bad + b'"}')])
    if where == 1:
        return RawCase("bad UTF-8", [post(BODY, headers=b"x-request-id: " + bad + b"\r\n")])
    return RawCase("bad UTF-8", [b"GET /v1/models/" + bad + b" HTTP/1.1\r\n" + HOST + b"\r\n"])


def _deep(rng: random.Random) -> RawCase:
    count = rng.choice((100, 10_000, 500_000))
    start = rng.choice((b"[", b'{"a":', b'[{"a":'))
    return RawCase("depth", [post(b'{"prompt":' + start * count)])


def _huge_numbers(rng: random.Random) -> RawCase:
    number = rng.choice((b"9" * 10_000, b"1e999999999", b"-" + b"9" * 400, b"0." + b"1" * 9000))
    name = rng.choice((b"max_tokens", b"seed", b"temperature", b"best_of", b"guided_json"))
    return RawCase("huge numbers", [post(b'{"prompt":"a","' + name + b'":' + number + b"}")])


def _half_closed(rng: random.Random) -> RawCase:
    data = post(BODY)
    cut = rng.choice((len(data), rng.randrange(1, len(data))))
    return RawCase("half-closed", [data[:cut]], half_close=True)


def _headers(rng: random.Random) -> RawCase:
    headers = rng.choice(
        (
            b"x: " + b"a" * 100_000 + b"\r\n",
            b"x: y\r\n" * 3000,
            b"x" * 70_000 + b": y\r\n",
            b"no colon\r\n",
            b"expect: 100-continue\r\n",
            b"upgrade: websocket\r\nconnection: upgrade\r\n",
            b"upgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAA\r\n",
            b"content-encoding: gzip\r\n",
            b"authorization: Bearer \x80\x81\r\n",
            b"host: other\r\n",
            b"content-type: text/plain\r\n",
        )
    )
    return RawCase("headers", [post(BODY, headers=headers)], most=2)


def _start_lines(rng: random.Random) -> RawCase:
    line = rng.choice(
        (
            b"GET / HTTP/0.9",
            b"GET / HTTP/2.0",
            b"PRI * HTTP/2.0\r\n\r\nSM",
            b"GET http://127.0.0.1/version HTTP/1.1",
            b"GET //version HTTP/1.1",
            b"GET /../version HTTP/1.1",
            b"GET /%2e%2e/%00 HTTP/1.1",
            b"GET /v1/models/%ff%fe HTTP/1.1",
            b"GET /v1/models/" + b"a/" * 20_000 + b" HTTP/1.1",
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1",
            b"GET /version?" + b"a=b&" * 9000 + b" HTTP/1.1",
            b"CONNECT 127.0.0.1:1 HTTP/1.1",
            b"OPTIONS * HTTP/1.1",
            b"TRACE /version HTTP/1.1",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"get /version http/1.1",
        )
    )
    return RawCase("start lines", [line + b"\r\n" + HOST + b"\r\n"], most=2)


KINDS: tuple[Callable[[random.Random], RawCase], ...] = (
    *(_chunked, _pipelined, _smuggled, _lengths, _bytes, _noise, _bad_utf8, _deep),
    *(_huge_numbers, _half_closed, _headers, _start_lines),
)


def send(port: int, case: RawCase) -> list[int]:
    """The statuses of all answers that came. A connection that is closed on us is an answer too."""
    received = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        try:
            for piece in case.pieces:
                sock.sendall(piece)
            if case.half_close:
                sock.shutdown(socket.SHUT_WR)
            sock.settimeout(SILENCE)
            while data := sock.recv(1 << 16):
                received += data
        except (TimeoutError, ConnectionError):
            pass
    return [int(status) for status in _STATUS.findall(bytes(received))]
