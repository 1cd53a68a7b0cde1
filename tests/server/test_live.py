"""A real uvicorn on a loopback port: closed connections, signals, the openai client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.server.fakes import CHAT, COMPLETIONS, EchoEngine, chat, completion, make_server

from vllm_di.errors import ConfigError, EngineDeadError
from vllm_di.server.app import OpenAiServer

ROOT = Path(__file__).parents[2]


class Live:
    """A server in a thread."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._started = threading.Event()
        self.error: BaseException | None = None

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.engine = EchoEngine(**self._options.pop("engine", {}))
        self.engine.state = self._options.pop("state", "ready")
        self.server: OpenAiServer = make_server(self.engine, **{"port": 0, **self._options})
        running = asyncio.create_task(self.server.run())
        while self.server.address is None and not running.done():
            await asyncio.sleep(0.001)
        self._started.set()
        try:
            await running
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Live:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.call(self.engine.go_on.set)
            self.call(self.server.stop)
            self._thread.join()
        assert not self.engine.live

    @property
    def url(self) -> str:
        assert self.server.address is not None
        return self.server.address

    def call(self, function: Callable[[], object]) -> None:
        """Call something in the server's loop."""
        self.loop.call_soon_threadsafe(function)

    def join(self) -> None:
        self._thread.join()


def wait_until(condition: Callable[[], bool]) -> None:
    """The test run's own time limit ends a wait that never comes true."""
    while not condition():
        time.sleep(0.002)


def test_openai_client() -> None:
    with Live() as live, openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        assert [m.id for m in client.models.list()] == ["echo"]
        messages: Any = [{"role": "user", "content": "Paris 🙂"}]
        length = len("Paris 🙂".encode())
        answer = client.chat.completions.create(
            model="echo",
            messages=messages,
            max_tokens=length,
            n=2,
            seed=3,
            logprobs=True,
            top_logprobs=2,
        )
        assert [c.message.content for c in answer.choices] == ["Paris 🙂"] * 2
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert (logprobs.content[0].token, logprobs.content[0].logprob) == ("P", -0.5)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2 * length
        stream = client.chat.completions.create(
            model="echo",
            messages=messages,
            max_tokens=length,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "Paris 🙂"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 2 * length
        plain = client.completions.create(model="echo", prompt=[104, 105], stop=["i"], logprobs=1)
        assert (plain.choices[0].text, plain.choices[0].finish_reason) == ("h", "stop")
        with pytest.raises(openai.BadRequestError, match="temperature") as refused:
            client.chat.completions.create(model="echo", messages=messages, temperature=-1)
        assert refused.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt", messages=messages)


def post_and_close(
    url: str, path: str, body: dict[str, Any], before_close: Callable[[socket.socket], object]
) -> None:
    """Send a request over a bare socket and hang up."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        before_close(connection)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_aborts_in_the_engine(path: str, stream: bool) -> None:
    with Live(engine={"patience": 2}) as live:

        def before_close(connection: socket.socket) -> None:
            wait_until(lambda: live.engine.num_waiting == 3)
            if stream:
                assert connection.recv(15) == b"HTTP/1.1 200 OK"

        body = {**(chat() if path == CHAT else completion()), "n": 3, "stream": stream}
        post_and_close(live.url, path, {**body, "max_tokens": 9}, before_close)
        wait_until(lambda: len(live.engine.aborted) == 3)
        assert not live.engine.live
        answer = httpx.post(live.url + COMPLETIONS, json=completion([97], max_tokens=1))
        assert answer.json()["choices"][0]["text"] == "a"


def test_listens_while_the_engine_starts() -> None:
    with Live(state="starting") as live:
        response = httpx.get(f"{live.url}/readyz")
        assert (response.status_code, response.json()["status"]) == (503, "starting")
        live.call(live.engine.go_on.set)
        wait_until(lambda: httpx.get(f"{live.url}/readyz").status_code == 200)


def test_an_engine_that_does_not_start_ends_the_server() -> None:
    with Live(state="starting") as live:
        live.call(lambda: live.engine.die("no memory"))
        live.join()
    assert isinstance(live.error, EngineDeadError)
    assert "no memory" in str(live.error)


def test_a_port_in_use_is_a_config_error() -> None:
    with Live() as live, Live(port=int(live.url.rpartition(":")[2])) as second:
        second.join()
    assert isinstance(second.error, ConfigError)
    assert "server.port" in str(second.error)


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Live(unix_socket=str(path)) as live:
        assert live.url == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://x") as client:
            assert client.get("/readyz").status_code == 200
    assert not path.exists()
    path.write_text("a file")
    with Live(unix_socket=str(path)) as live:
        live.join()
    assert isinstance(live.error, ConfigError)
    assert path.read_text() == "a file"


@contextmanager
def process(delay: float, **settings: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    arguments = [str(delay), *(f"{k}={v}" for k, v in settings.items())]
    running = subprocess.Popen(
        [sys.executable, "-m", "tests.server.process", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"},
    )
    assert running.stdout is not None
    try:
        yield running, running.stdout.readline().strip()
    finally:
        running.kill()
        running.stdout.close()
        running.wait()


def output_of(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    running.wait()
    return running.stdout.read().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: signal.Signals) -> None:
    with process(0.0, patience=2) as (running, url), httpx.Client(base_url=url) as client:
        request = chat("ab", max_tokens=40, stream=True)
        with client.stream("POST", CHAT, json=request) as response:
            lines = response.iter_lines()
            next(lines)
            running.send_signal(number)
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 503)
            assert httpx.get(f"{url}/readyz").json() == {"status": "draining"}
            refused = httpx.post(f"{url}{CHAT}", json=chat(max_tokens=1))
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert "retry-after" in refused.headers
            running.send_signal(signal.SIGUSR1)
            *_, done = [line for line in lines if line]
            assert done == "data: [DONE]"
        assert output_of(running) == "left=0 aborted=0"
        assert running.returncode == 0


def test_a_drain_has_an_end() -> None:
    with process(0.0, patience=2, drain_seconds=0.05) as (running, url):
        request = chat("ab", max_tokens=200, stream=True)
        with httpx.stream("POST", url + CHAT, json=request) as response:
            lines = response.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            *_, last = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert output_of(running) == "left=0 aborted=1"
        assert running.returncode == 0


def test_a_second_signal_ends_at_once() -> None:
    with process(600.0, keep_alive_seconds=0.02) as (running, url):
        with httpx.stream("POST", url + CHAT, json=chat(stream=True)) as response:
            lines = response.iter_lines()
            assert next(lines) == ": keep-alive"
            running.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 503)
            running.send_signal(signal.SIGTERM)
            *_, last = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert output_of(running) == "left=0 aborted=1"
        assert running.returncode == 0
