"""The HTTP API on this platform: what OpenAI clients send, and what they must get."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_di.conformance.subject import Subject

START_SECONDS, STOP_SECONDS = 120.0, 20.0
METRICS = ("vllm:num_requests_running", "vllm:generation_tokens", "vllm:prompt_tokens")


class Client:
    """One server process, asked over HTTP."""

    def __init__(self, port: int) -> None:
        self.port = port

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> Any:
        status, text = self.send("POST", path, {"model": "conform", **body})
        assert status == 200, f"{path}: {status} {text[:500]!r}"
        return json.loads(text)


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The server, started by the first test that asks."""
    state: dict[str, Any] = {}
    yield state
    if process := state.get("process"):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        finally:
            process.kill()
            process.communicate()


@pytest.fixture
def client(subject: Subject, running: dict[str, Any]) -> Client:
    if "client" not in running:
        running["client"], running["process"] = serve(subject)
    found: Client = running["client"]
    return found


def serve(subject: Subject) -> tuple[Client, subprocess.Popen[str]]:
    subject.need_driver()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    given = [*subject.overrides_of("gqa"), "model_name=conform", f"server.port={port}"]
    folders = [w for folder in subject.config_dirs for w in ("--config-dir", str(folder))]
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_di.cli", "serve", *given, *folders],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    client, deadline = Client(port), time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.send("GET", "/readyz")[0] == 200:
                return client, process
        except OSError:
            pass
        time.sleep(0.05)
    process.kill()
    output = process.communicate()[0]
    raise AssertionError(f"the server did not become ready: {output[-2000:]}")


def test_models_and_metrics(client: Client) -> None:
    status, text = client.send("GET", "/v1/models")
    assert status == 200
    assert [m["id"] for m in json.loads(text)["data"]] == ["conform"]
    client.post("/v1/completions", prompt="x", max_tokens=2)
    status, text = client.send("GET", "/metrics")
    assert status == 200
    lacking = [name for name in METRICS if name.encode() not in text]
    assert not lacking, f"metrics lack {', '.join(lacking)}"


def test_version_carries_the_level(client: Client, subject: Subject) -> None:
    status, text = client.send("GET", "/version")
    assert status == 200
    assert subject.manifest.level in text.decode(), text


def test_completion(client: Client) -> None:
    found = client.post(
        "/v1/completions", prompt="hello", max_tokens=5, temperature=0, logprobs=2, n=1
    )
    assert found["usage"]["completion_tokens"] <= 5
    assert found["choices"][0]["finish_reason"] in ("length", "stop")
    assert len(found["choices"][0]["logprobs"]["token_logprobs"]) >= 1
    again = client.post("/v1/completions", prompt="hello", max_tokens=5, temperature=0)
    assert again["choices"][0]["text"] == found["choices"][0]["text"]


def test_chat_and_stream(client: Client) -> None:
    """A stream's pieces are the whole answer."""
    messages = [{"role": "user", "content": "hello"}]
    settings: dict[str, Any] = {"messages": messages, "max_tokens": 8, "temperature": 0}
    whole = client.post("/v1/chat/completions", **settings)
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant"
    body = {"model": "conform", "stream": True, **settings}
    status, text = client.send("POST", "/v1/chat/completions", body)
    assert status == 200
    lines = [line[6:] for line in text.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
    assert "".join(d.get("content") or "" for d in deltas) == message["content"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "x", "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 10**6}, "max_tokens"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
    ],
)
def test_errors_name_the_field(client: Client, path: str, body: Any, param: str) -> None:
    status, text = client.send("POST", path, {"model": "conform", **body})
    assert status == 400, f"{status}: {text[:300]!r}"
    assert param in json.dumps(json.loads(text)["error"])


def test_an_unknown_model_is_refused(client: Client) -> None:
    status, _ = client.send("POST", "/v1/completions", {"model": "other", "prompt": "x"})
    assert status == 404


def test_it_stops_when_told(client: Client, running: dict[str, Any]) -> None:
    process = running["process"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(STOP_SECONDS) == 0, f"exit status {process.returncode}"
