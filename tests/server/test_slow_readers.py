"""Clients that read slowly or not at all: the engine goes on, and what waits for them is bounded.

Over a Unix socket, whose buffers in the kernel are small.
"""

from __future__ import annotations

import asyncio
import json
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
import uvicorn
from tests.server.fakes import CHAT, COMPLETIONS, EchoEngine, chat, completion, make_server
from tests.server.test_connections import post, read_to_end
from tests.server.test_live import Live, wait_until
from uvicorn.server import ServerState

from vllm_di.components.messages import TokenLogprobs
from vllm_di.frontend.processor import Update
from vllm_di.server.connection import HIGH_WATER, Connection, Limits
from vllm_di.server.updates import Updates

MUCH: dict[str, Any] = {"max_tokens": 250, "logprobs": 20, "n": 16}  # more than a socket holds


def connect(live: Live) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(live.url.removeprefix("unix:"))
    return connection


def client_of(live: Live) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=live.url.removeprefix("unix:"))
    return httpx.Client(transport=transport, base_url="http://localhost")


def has_hung_up(connection: socket.socket) -> Callable[[], bool]:
    poll = select.poll()
    poll.register(connection, select.POLLHUP)
    return lambda: bool(poll.poll(0))


@pytest.mark.parametrize("stream", [True, False])
def test_places_are_free_when_the_engine_is_done(stream: bool, tmp_path: Path) -> None:
    settings = {"unix_socket": str(tmp_path / "s"), "max_queue": 16, "max_unsent_bytes": 2**30}
    with Live(**settings) as live, connect(live) as stalled, client_of(live) as other:
        stalled.sendall(post(completion(**MUCH, stream=stream)))
        wait_until(lambda: len(live.engine.requests) == 16 and not live.engine.live)
        for _ in range(3):
            answer = other.post(COMPLETIONS, json=completion(n=16, max_tokens=1))
            assert answer.status_code == 200
        assert not live.engine.aborted
        stalled.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data = read_to_end(stalled)  # all of it came to who reads late
        assert data.count(b'"finish_reason":"length"') == 16
        assert (b"[DONE]" in data) is stream


@pytest.mark.parametrize("stream", [True, False])
def test_a_write_that_does_not_go_on_ends_the_connection(stream: bool, tmp_path: Path) -> None:
    settings = {"unix_socket": str(tmp_path / "s"), "write_timeout_seconds": 0.2}
    settings["max_unsent_bytes"] = 2**30
    with Live(**settings) as live, connect(live) as stalled:
        stalled.sendall(post(completion(**MUCH, stream=stream)))
        wait_until(has_hung_up(stalled))
        with client_of(live) as other:
            assert other.get("/readyz").status_code == 200
        assert b"[DONE]" not in read_to_end(stalled)


def test_an_answer_that_is_written_out_has_a_deadline_too(tmp_path: Path) -> None:
    """Its last bytes wait in the server, and closing a connection waits for them."""
    settings = {"unix_socket": str(tmp_path / "s"), "write_timeout_seconds": 0.2}
    with Live(**settings, idle_connection_seconds=1) as live, connect(live) as stalled:
        request = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
        stalled.sendall(request * 2000)
        wait_until(has_hung_up(stalled))


def test_what_waits_for_a_slow_reader_is_bounded(tmp_path: Path) -> None:
    settings = {"unix_socket": str(tmp_path / "s"), "max_unsent_bytes": 128 * 1024}
    with Live(**settings) as live, connect(live) as stalled:
        body = chat(stream=True, n=64, max_tokens=250, logprobs=True, top_logprobs=20)
        stalled.sendall(post(body).replace(COMPLETIONS.encode(), CHAT.encode()))
        wait_until(lambda: len(live.engine.aborted) > 32 and not live.engine.live)
        stalled.shutdown(socket.SHUT_WR)
        data = read_to_end(stalled)
        assert len(data) < 2**20, "of 20 MB"


def test_a_slow_reader_is_told(tmp_path: Path) -> None:
    settings = {"unix_socket": str(tmp_path / "s"), "max_unsent_bytes": 128 * 1024}
    with Live(**settings) as live, connect(live) as stalled:
        stalled.sendall(post(completion(stream=True, n=64, max_tokens=250, logprobs=20)))
        wait_until(lambda: len(live.engine.aborted) > 32 and not live.engine.live)
        data = b""
        while b"0\r\n\r\n" not in data[-16:]:
            data += stalled.recv(65536)
        last = data.rpartition(b"data: ")[2].partition(b"\n")[0]
        assert json.loads(last)["error"]["code"] == "client_too_slow"


def test_a_stream_that_is_read_is_never_too_slow() -> None:
    """However much one step of the engine brings: only what cannot be written counts."""

    async def main() -> None:
        server = make_server(EchoEngine(), max_unsent_bytes=128 * 1024)
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            request = completion(stream=True, n=128, max_tokens=20, logprobs=20)
            answer = await client.post(COMPLETIONS, json=request)
            assert answer.text.count('"finish_reason":"length"') == 128

    asyncio.run(main())


def test_waiting_updates_are_merged() -> None:
    async def main() -> None:
        updates = Updates()
        for i in range(10_000):
            logprobs = [TokenLogprobs([i], [0.0], 1)] if i % 2 else None
            for index in range(2):
                update = Update(request_id="r", index=index, text="é", token_ids=[i])
                update.logprobs, update.finish_reason = logprobs, "stop" if i == 9999 else None
                updates.put(0, update)
        assert updates.num_bytes > 20_000 * 40
        error = ValueError("the end")
        updates.end(error)
        taken = [item[1] for _ in range(64) if (item := await anext(updates)) is not None]
        with pytest.raises(ValueError, match="the end"):
            await anext(updates)
        assert updates.num_bytes == 0
        for index in range(2):
            mine = [u for u in taken if u.index == index]
            assert "".join(u.text for u in mine) == "é" * 10_000
            assert [t for u in mine for t in u.token_ids] == list(range(10_000))
            entries = [e for u in mine for e in u.logprobs or ()]
            assert [e.token_ids[0] for e in entries] == list(range(1, 10_000, 2))
            assert [u.finish_reason for u in mine][-1] == "stop"
            assert {u.finish_reason for u in mine[:-1]} <= {None}

    asyncio.run(main())


def test_progress_is_what_counts() -> None:
    """A reader may be as slow as it likes, so long as it reads."""

    async def main() -> None:
        limits = Limits(connections=1, header_timeout=1e9, write_timeout=10.0)
        config = uvicorn.Config(make_server(EchoEngine()).app, log_config=None, ws="none")
        transport = MagicMock()
        transport.is_closing.return_value = False
        connection = Connection(config, ServerState(), {}, limits=limits)
        connection.connection_made(transport)
        transport.set_write_buffer_limits.assert_called_once_with(high=HIGH_WATER)
        connection.cycle = MagicMock(response_complete=False)

        def check(seconds: float, num_unsent: int) -> bool:
            transport.get_write_buffer_size.return_value = num_unsent
            connection.check(start + seconds)
            return bool(transport.abort.called)

        start = asyncio.get_running_loop().time()
        for second in range(0, 100, 9):  # more is written than is read, the writer need not wait
            assert not check(second, 100 + second)
        connection.pause_writing()
        for second in range(100, 200, 9):
            assert not check(second, 1000 - second)
        connection.cycle.response_complete = True
        for second in range(200, 300, 9):
            assert not check(second, 500 - second)
        assert not check(306, 201)
        assert check(310, 201)

    asyncio.run(main())
