"""The small endpoints: state, models, tokenising, request ids, admission."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest
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

import vllm_di
from vllm_di.components.interfaces import INTERFACE_VERSION


def test_models_and_version() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("echo", "model", 256)
        assert (await client.get("/v1/models/echo")).json() == model
        assert (await client.get("/version")).json() == {
            "version": vllm_di.__version__,
            "platform": None,  # as no config names one here
            "level": None,
            "claimed_level": None,
            "interface": INTERFACE_VERSION,
        }

    with_client(test)


def test_served_model_name() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert (model["id"], model["root"]) == ("org/name", "echo")
        assert (await client.get("/v1/models/org/name")).status_code == 200
        request = {**chat(max_tokens=1), "model": "org/name"}
        assert (await client.post(CHAT, json=request)).json()["model"] == "org/name"
        assert (await client.post(CHAT, json=chat())).status_code == 404

    with_client(test, served_model_name="org/name")


def test_tokenize_and_back() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        body = (await client.post("/tokenize", json={"prompt": "hé"})).json()
        assert body == {
            "count": 4,
            "max_model_len": 256,
            "tokens": [256, 104, 195, 169],
            "token_strs": None,
        }
        asked = {"prompt": "h", "add_special_tokens": False, "return_token_strs": True}
        body = (await client.post("/tokenize", json=asked)).json()
        assert (body["tokens"], body["token_strs"]) == ([104], ["h"])
        asked = {"messages": [{"role": "user", "content": "hi"}]}
        assert (await client.post("/tokenize", json=asked)).json()["tokens"] == [104, 105]
        body = (await client.post("/detokenize", json={"tokens": [104, 195, 169]})).json()
        assert body == {"prompt": "hé"}
        for path, bad in [
            ("/tokenize", {}),
            ("/tokenize", {"prompt": "x", "messages": []}),
            ("/tokenize", {"prompt": "x", "chat_template": "y"}),
            ("/detokenize", {"tokens": [-1]}),
            ("/detokenize", {"tokens": [300]}),
            ("/detokenize", {"tokens": "x"}),
        ]:
            assert (await client.post(path, json=bad)).status_code == 400, bad

    with_client(test)


def test_request_ids() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        for given, echoed in [
            ("abc-1.2_3", True),
            ("x" * 128, True),
            ("x" * 129, False),
            ("with space", False),
            ("a;b", False),
            ("é", False),
            ("", False),
        ]:
            headers = [(b"x-request-id", given.encode())]
            response = await client.post(CHAT, json=chat(max_tokens=1), headers=headers)
            own = response.headers["x-request-id"]
            assert own == given if echoed else re.fullmatch(r"req-[0-9a-f]{32}", own)
        names = {r.request_id for r in engine.requests}
        assert len(names) == 7, "ids in the engine are always the server's own"
        assert all(re.fullmatch(r"chatcmpl-[0-9a-f]{32}", n) for n in names)
        sent = {"x-request-id": "mine"}
        for refused in ("/nothing", CHAT, "/v1/models/other"):
            assert (await client.get(refused, headers=sent)).headers["x-request-id"] == "mine"
        streamed = chat(max_tokens=1, stream=True)
        answer = await client.post(CHAT, json=streamed, headers=sent)
        assert answer.headers["x-request-id"] == "mine"
        page = {"origin": "https://a.example", "access-control-request-method": "POST"}
        for origin in ("https://a.example", "https://b.example"):
            answer = await client.options(CHAT, headers={**page, **sent, "origin": origin})
            assert answer.headers["x-request-id"] == "mine"

    with_client(test, cors_origins=["https://a.example"])


@pytest.mark.parametrize(
    ("state", "health", "live"), [("starting", 503, 200), ("ready", 200, 200), ("dead", 503, 503)]
)
def test_state(state: str, health: int, live: int) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        engine.state = state  # type: ignore[assignment]
        engine.failure = "worker 0: out of memory" if state == "dead" else None
        ready = await client.get("/readyz")
        assert ready.status_code == health
        assert ready.json()["status"] == state
        assert ready.json().get("stage") == ("load" if state == "starting" else None)
        assert ready.json().get("reason") == engine.failure
        for path in ("/health", "/ping"):
            assert (await client.get(path)).status_code == health
        assert (await client.get("/livez")).status_code == live
        assert (await client.get("/metrics")).status_code == 200
        for path, request in [(CHAT, chat(max_tokens=1)), (COMPLETIONS, completion(max_tokens=1))]:
            response = await client.post(path, json=request)
            assert response.status_code == health
            if state == "starting":
                assert response.headers["retry-after"] == "1"
                assert "load" in response.json()["error"]["message"]
            if state == "dead":
                assert response.json()["error"]["code"] == "engine_dead"
                assert "out of memory" in response.json()["error"]["message"]

    with_client(test)


def test_the_queue_is_bounded() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        held = [
            asyncio.create_task(client.post(CHAT, json=chat(max_tokens=3, n=2))) for _ in range(2)
        ]
        await engine.until_waiting(4)
        response = await client.post(CHAT, json=chat(max_tokens=1))
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "queue_full"
        engine.go_on.set()
        assert [(await task).status_code for task in held] == [200, 200]
        assert (await client.post(CHAT, json=chat(max_tokens=1))).status_code == 200

    with_client(test, engine={"patience": 1}, max_queue=4)


def test_a_dying_engine_ends_open_requests() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        whole = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=3)))
        stream = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=3, stream=True)))
        early = asyncio.create_task(
            client.post(CHAT, json=chat(max_tokens=3, stream=True, n=3, seed=1))
        )
        await engine.until_waiting(5)
        engine.die("worker 1 was killed")
        answer = await whole
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        for task in (stream, early):
            streamed = await task
            assert streamed.status_code == 200
            last = streamed.text.rstrip().split("\n\n")[-1]
            assert '"engine_dead"' in last
            assert "worker 1 was killed" in last

    with_client(test, engine={"patience": 1})


def test_an_engine_that_dies_before_the_first_token_has_a_status() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        stream = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=3, stream=True)))
        await engine.until_waiting(1)
        engine.die("killed")
        assert (await stream).status_code == 503

    with_client(test, engine={"patience": 0})


def test_a_refusal_by_the_engine_keeps_its_status_in_a_stream() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        request = chat(stream=True, response_format={"type": "json_object"})
        response = await client.post(CHAT, json=request)
        assert response.status_code == 400
        assert response.headers["content-type"] == "application/json"

    with_client(test)


def test_no_cors_and_no_websocket() -> None:
    async def main() -> None:
        server = make_server(EchoEngine())
        async with client_of(server) as client:
            headers = {"origin": "http://evil", "access-control-request-method": "POST"}
            response = await client.options(CHAT, headers=headers)
            assert response.status_code == 405
            assert not [h for h in response.headers if h.startswith("access-control")]

    asyncio.run(main())


def test_no_torch_in_the_api_process() -> None:
    """In a process of its own, because other tests import torch."""
    import subprocess
    import sys

    code = (
        "import sys, pkgutil, importlib, vllm_di.server, vllm_di.frontend\n"
        "parts = [vllm_di.server, vllm_di.frontend]\n"
        "walk = pkgutil.iter_modules\n"
        "names = [m.name for p in parts for m in walk(p.__path__, p.__name__ + '.')]\n"
        "slots = 'tokenizer.hf tokenizer.bytes chat_template.jinja tool_parser.none "
        "reasoning_parser.none metrics.prometheus'.split()\n"
        "for n in names + ['vllm_di.components.' + s for s in slots]: importlib.import_module(n)\n"
        "bad = {'torch', 'transformers', 'hydra', 'omegaconf'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
