"""Connections that take without giving: each has a deadline or a bound, and others go on."""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import httpx
import pytest
from tests.server.fakes import COMPLETIONS, completion
from tests.server.test_live import Live, wait_until

from vllm_di.errors import ConfigError
from vllm_di.server.config import ServerConfig
from vllm_di.server.connection import RESERVED_FILES, Limits
from vllm_di.server.rarely import Rarely

SHORT = {"header_timeout_seconds": 0.2, "write_timeout_seconds": 0.2}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(live: Live, receive_buffer: int | None = None) -> socket.socket:
    host, _, port = live.url.removeprefix("http://").rpartition(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    data = b""
    while more := connection.recv(65536):
        data += more
    return data


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer as it came over the wire."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    assert re.search(rb"\r\nx-request-id: [\w.-]+", head.lower())
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


def answer_to(live: Live, begin: bytes) -> bytes:
    """All that comes back on a new connection that says no more."""
    with connect(live) as silent, suppress(ConnectionError):
        silent.sendall(begin)
        return read_to_end(silent)
    return b""


def is_well(live: Live) -> bool:
    try:
        answer = httpx.post(live.url + COMPLETIONS, json=completion([97], max_tokens=1))
    except httpx.TransportError:
        return False
    return answer.status_code == 200


def with_an_answer(live: Live) -> socket.socket:
    """A connection that was answered and kept: a new one, where its head came too slowly."""
    while True:
        connection = connect(live)
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        if connection.recv(12) == b"HTTP/1.1 200":
            return connection
        connection.close()


def post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data


@pytest.mark.parametrize("begin", [b"", b"G", b"GET /health HT", HEAD])
def test_a_head_that_does_not_come(begin: bytes) -> None:
    with Live(**SHORT) as live:
        answer = answer_to(live, begin)
        while begin and not answer:  # it came after its time: this machine is busy
            answer = answer_to(live, begin)
        if begin:
            assert error_of(answer)[0] == 408
        else:
            assert answer == b""
        wait_until(lambda: is_well(live))


def test_the_next_head_of_a_kept_connection() -> None:
    """Bytes that trickle in must not put the end off: neither the idle time nor the head's."""
    with Live(**SHORT, idle_connection_seconds=1) as live, with_an_answer(live) as slow:
        slow.settimeout(0.05)
        ended = False
        while not ended:
            try:
                slow.sendall(b"G")
                ended = not slow.recv(65536)
            except TimeoutError:
                pass
            except OSError:
                ended = True


def test_a_body_that_trickles_in() -> None:
    """Whether the application waits for it, or has answered already."""
    with Live(header_timeout_seconds=1.0, body_timeout_seconds=0.2) as live:
        for path in (b"/v1/completions", b"/nothing", b"/livez"):
            with connect(live) as slow:
                slow.sendall(HEAD.replace(b"/v1/completions", path) + b"Content-Length: 99999\r\n")
                slow.sendall(b"\r\n")
                slow.settimeout(0.05)
                answer, ended = b"", False
                while not ended:
                    try:
                        slow.sendall(b" ")
                        more = slow.recv(65536)
                        answer, ended = answer + more, not more
                    except TimeoutError:
                        pass
                    except OSError:
                        ended = True
                status = {b"/v1/completions": 408, b"/nothing": 404, b"/livez": 405}[path]
                assert error_of(answer)[0] == status


def test_beyond_the_cap_there_is_503(caplog: pytest.LogCaptureFixture) -> None:
    with Live(max_connections=3) as live, ExitStack() as held:
        idle = [held.enter_context(connect(live)) for _ in range(3)]
        answers = []
        for _ in range(5):
            with connect(live) as further:
                further.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = read_to_end(further)
                assert b"retry-after: 1" in answer.lower()
                answers.append(error_of(answer))
        assert [(status, error["code"]) for status, error in answers] == [
            (503, "too_many_connections")
        ] * 5
        with connect(live) as silent:  # told so too, after a while
            assert error_of(read_to_end(silent))[0] == 503
        for connection in idle:
            connection.close()
        wait_until(lambda: httpx.get(f"{live.url}/livez").status_code == 200)
        assert is_well(live)
    lines = [r for r in caplog.records if "max_connections" in r.getMessage()]
    assert len(lines) == 1


def test_far_beyond_the_cap_connections_are_closed() -> None:
    with Live(max_connections=1) as live, ExitStack() as held:
        crowd = [held.enter_context(connect(live)) for _ in range(150)]
        closed = 0
        for connection in crowd[1:]:
            try:
                closed += not read_to_end(connection)
            except ConnectionResetError:
                closed += 1
        assert 0 < closed < 149, "some were told, the others not"


def test_few_open_files_do_not_fill_the_log(tmp_path: Any) -> None:
    """At most one line says that the cap was met, and one that a file was wanted."""
    limit = RESERVED_FILES + 20
    command = f"ulimit -n {limit}; exec {sys.executable} -m tests.server.process 0"
    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        running = subprocess.Popen(
            ["sh", "-c", command], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert running.stdout is not None
    with closing(running.stdout), ExitStack() as held:
        url = running.stdout.readline().strip()
        host, _, port = url.removeprefix("http://").rpartition(":")
        for _ in range(2 * limit):
            held.enter_context(socket.create_connection((host, int(port))))
        held.close()
        wait_until(lambda: answers(f"{url}/livez"))
        running.send_signal(signal.SIGTERM)
        running.wait()
    lines = [line for line in errors.read_text().splitlines() if "tokenizer" not in line]
    assert len(lines) <= 2, lines


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def few_files() -> Iterator[Callable[[int], None]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda count: resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_cap_is_below_the_limit_of_open_files(few_files: Callable[[int], None]) -> None:
    few_files(1024)
    room = 1024 - RESERVED_FILES
    assert Limits.of(ServerConfig()).connections == room
    assert Limits.of(ServerConfig(max_connections=room)).connections == room
    with pytest.raises(ConfigError, match=rf"max_connections={room + 1}: .*{room} at most.*ulimit"):
        Limits.of(ServerConfig(max_connections=room + 1))
    few_files(RESERVED_FILES)
    with pytest.raises(ConfigError, match=r"max_connections=null: .*raise the limit: ulimit -n"):
        Limits.of(ServerConfig())


def test_a_line_of_the_log_is_rare(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    line = Rarely(logging.getLogger("some"), 60.0, lambda: now[0])
    for second in range(120):
        now[0] = second
        line.warning("it is %s", second)
    assert [r.getMessage() for r in caplog.records] == [
        "it is 0",
        "it is 60 (59 more since the last such line)",
    ]
