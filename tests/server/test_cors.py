"""Web pages of other origins: kept out unless the config names them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from tests.server.fakes import CHAT, EchoEngine, chat, with_client

PAGE = "https://page.example"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize("origins", [[PAGE], ["*"]])
def test_a_page_that_is_named(origins: list[str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")

    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        asked = await client.options(CHAT, headers={"origin": PAGE, **PREFLIGHT})
        assert asked.status_code == 200, "browsers send no key with a preflight"
        allowed = asked.headers["access-control-allow-headers"]
        assert set(PREFLIGHT["access-control-request-headers"].split(",")) <= set(
            allowed.split(",")
        )
        for key, status in (("a-key", 200), ("none", 401)):
            headers = {"origin": PAGE, "authorization": f"Bearer {key}"}
            answer = await client.post(CHAT, json=chat(max_tokens=1), headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] in (PAGE, "*")
            assert "access-control-allow-credentials" not in answer.headers

    with_client(test, cors_origins=origins, api_key_file=str(keys))


def test_other_pages() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        headers = {"origin": "https://evil.example", **PREFLIGHT}
        asked = await client.options(CHAT, headers=headers)
        assert asked.status_code == 400
        assert asked.json()["error"]["code"] == "cors_refused"
        assert "access-control-allow-origin" not in asked.headers
        answer = await client.get("/v1/models", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers

    with_client(test, cors_origins=[PAGE])


def test_off_by_default() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        asked = await client.options(CHAT, headers={"origin": PAGE, **PREFLIGHT})
        assert (asked.status_code, asked.json()["error"]["code"]) == (405, "method_not_allowed")
        assert not [h for h in asked.headers if h.startswith("access-control")]

    with_client(test)
