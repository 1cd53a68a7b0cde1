"""The page at ``/``: who gets it, under which policy, and what ``/assembly`` says."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx
import msgspec
import pytest
from tests.server.fakes import OVERVIEW, EchoEngine, client_of, make_server, with_client
from tests.server.served import served

from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.server.auth import PAGE_PATHS
from vllm_di.server.page.endpoints import FOLDER

TYPES = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
FILES = {path: FOLDER / (path[1:] or "index.html") for path in TYPES}


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    file = tmp_path / "keys"
    file.write_text("a-key\n")
    return str(file)


def test_its_files_and_their_policy() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        assert {*TYPES} == PAGE_PATHS
        for path, kind in TYPES.items():
            answer = await client.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
            assert answer.text == FILES[path].read_text("utf-8")
            policy = dict(
                rule.strip().split(" ", 1)
                for rule in answer.headers["content-security-policy"].split(";")
            )
            assert policy["default-src"] == "'none'"
            for source in ("script-src", "style-src", "connect-src"):
                assert policy[source] == "'self'"
            assert policy["frame-ancestors"] == policy["form-action"] == "'none'"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"

    with_client(test)


def test_it_holds_nothing_that_the_policy_forbids_and_no_other_address() -> None:
    texts = {path: file.read_text("utf-8") for path, file in FILES.items()}
    html, script = texts["/"], texts["/page.js"]
    assert not re.findall(r"\son\w+=|\sstyle=|<style|javascript:", html)
    assert all(" src=" in tag for tag in re.findall(r"<script[^>]*>", html))
    makers = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc"
    assert not re.findall(makers, script)
    for text in texts.values():
        assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w", text)


@pytest.mark.parametrize("path", [*TYPES, "/assembly"])
def test_it_can_be_turned_off(path: str, key_file: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        answer = await client.get(path, headers={"authorization": "Bearer a-key"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "page_off")

    with_client(test, page=False)
    with_client(test, page=False, api_key_file=key_file)


@pytest.mark.parametrize("path", [*TYPES, "/assembly"])
def test_without_keys_it_is_for_loopback_alone(path: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        for there in ("http://127.0.0.1", "http://[::1]:8000", "http://[::ffff:127.0.0.1]"):
            assert (await client.get(there + path)).status_code == 200
        answer = await client.get(f"http://10.0.0.1{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "page_off")
        assert "loopback" in answer.json()["error"]["message"]
        answer = await client.get(f"http://127.0.0.1{path}", headers={"host": "evil.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (421, "host_not_allowed")

    with_client(test, host="0.0.0.0", insecure=True)


def test_with_keys_the_files_are_open_and_the_rest_is_not(key_file: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        for path in TYPES:
            assert (await client.get(f"http://10.0.0.1{path}")).status_code == 200
            assert (await client.post(f"http://10.0.0.1{path}")).status_code == 405
        for path in ("/assembly", "/v1/models", "/metrics"):
            assert (await client.get(f"http://10.0.0.1{path}")).status_code == 401
        headers = {"authorization": "Bearer a-key"}
        answer = await client.get("http://10.0.0.1/assembly", headers=headers)
        assert answer.json() == msgspec.to_builtins(OVERVIEW)
        assert "a-key" not in answer.text

    with_client(test, host="0.0.0.0", api_key_file=key_file)


def test_a_server_that_nobody_described() -> None:
    async def test() -> None:
        server = make_server(EchoEngine())
        server.show_assembly(None)
        async with client_of(server) as client:
            answer = await client.get("/assembly")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "assembly_unknown")

    asyncio.run(test())


def test_a_server_says_what_explain_says(key_file: str) -> None:
    overrides = ["model=tiny", "platform=cpu", "model.dtype=float32", "attention=sdpa"]
    with served([*overrides, f"server.api_key_file={key_file}"]) as url:
        answer = httpx.get(f"{url}/assembly", headers={"authorization": "Bearer a-key"})
        page = httpx.get(f"{url}/")
    assert page.text == FILES["/"].read_text("utf-8")
    told = explain(assemble(overrides), ops=False)
    views = json.loads(answer.text)
    assert views["announcement"] == told.announcement
    shown = {s["key"]: (c["name"], s) for c in views["containers"] for s in c["slots"]}
    assert {*shown} == {row.slot for row in told.rows}
    for row in told.rows:
        container, slot = shown[row.slot]
        assert container == row.container
        for field in ("target", "chosen_by", "place", "alternatives", "option", "interface"):
            assert slot[field] == getattr(row, field), (row.slot, field)
    assert key_file not in answer.text
    assert "a-key" not in answer.text
