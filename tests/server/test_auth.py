"""Keys: everything is closed but health, whatever the spelling of the path."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from tests.server.fakes import CHAT, EchoEngine, chat, make_server, with_client

from vllm_di.errors import ConfigError
from vllm_di.server.auth import OPEN_PATHS, PAGE_PATHS
from vllm_di.server.routes import operations
from vllm_di.server.service import Service

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO"]
OFFERED = operations(Service.__new__(Service))
PATHS = [*dict.fromkeys(one.path.replace("{model:path}", "echo") for one in OFFERED)]


def spellings(path: str) -> list[str]:
    """Other ways to write a path, some of which proxies or frameworks take for the same."""
    encoded = "".join(f"%{ord(c):02x}" for c in path[1:])
    return [
        path,
        path + "/",
        "/" + path,
        path.upper(),
        "/" + encoded,
        path.replace("/", "%2f"),
        path + "?x=/health",
        path + "%00",
        path + ";/health",
        "/health/.." + path,
        "/health%2f.." + path,
        "/./" + path[1:],
        path + "#/health",
        path + "/../health/../x",
    ]


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    file = tmp_path / "keys"
    file.write_text("# two keys\nfirst-key\n\n  second-key  \n")
    return str(file)


def test_every_route_and_spelling_is_closed(key_file: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        closed = 0
        for path in [*PATHS, "/nothing", "/docs", "/openapi.json"]:
            for url in spellings(path):
                for method in METHODS if url == path else ["GET", "POST"]:
                    request = client.build_request(method, url, headers={"host": "health"})
                    response = await client.send(request)
                    if request.url.path in OPEN_PATHS:
                        assert response.status_code in (200, 405)
                    else:
                        closed += 1
                        assert response.status_code == 401, (method, url)
        assert closed > 300
        assert not engine.requests

    with_client(test, api_key_file=key_file)


def test_open_paths_need_no_key(key_file: str) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        assert {"/health", "/livez", "/readyz", "/ping"} == OPEN_PATHS - PAGE_PATHS
        assert {"/", "/page.css", "/page.js"} == PAGE_PATHS
        for path in OPEN_PATHS:
            assert (await client.get(path)).status_code == 200

    with_client(test, api_key_file=key_file)


def test_right_and_wrong_keys(key_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "third-key")

    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        for good in [
            "Bearer first-key",
            "bearer second-key",
            "Bearer third-key",
            "BEARER  first-key",
        ]:
            headers = {"authorization": good}
            response = await client.post(CHAT, json=chat(max_tokens=1), headers=headers)
            assert response.status_code == 200, good
        for bad in [
            "Bearer ",
            "Bearer",
            "first-key",
            "Basic first-key",
            "Bearer first-ke",
            "Bearer first-keyx",
            "Bearer # two keys",
            "Bearer first-key second-key",
            "Bearer \xff",
        ]:
            headers_list = [(b"authorization", bad.encode("latin-1"))]
            response = await client.post(CHAT, json=chat(), headers=headers_list)
            assert response.status_code == 401, bad
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"

    with_client(test, api_key_file=key_file, api_key_env="SOME_KEY")


def test_without_keys_the_server_is_open() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        assert (await client.get("/v1/models")).status_code == 200

    with_client(test)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_other_machines_need_a_key(host: str, key_file: str) -> None:
    with pytest.raises(ConfigError, match=r"api_key_file.*insecure"):
        make_server(EchoEngine(), host=host)
    make_server(EchoEngine(), host=host, insecure=True)
    make_server(EchoEngine(), host=host, api_key_file=key_file)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    make_server(EchoEngine(), host=host)


def test_useless_key_settings_are_errors(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="there is no key in it"):
        make_server(EchoEngine(), api_key_file=str(empty))
    with pytest.raises(ConfigError, match="cannot be read"):
        make_server(EchoEngine(), api_key_file=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        make_server(EchoEngine(), api_key_env="NO_SUCH_VARIABLE")
