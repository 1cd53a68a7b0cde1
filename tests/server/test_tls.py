"""HTTPS: files are checked at the start and read again when they change, clients may have to show
certificates, and what does not speak TLS holds nobody up."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from tests.server.certificates import HOST, Authority
from tests.server.fakes import CHAT, chat
from tests.server.test_connections import error_of, read_to_end
from tests.server.test_live import Live, wait_until

from vllm_di.errors import ConfigError
from vllm_di.server import tls as tls_module
from vllm_di.server.connection import ACCEPTED_AT_ONCE
from vllm_di.server.tls import Tls, TlsConfig, not_after
from vllm_di.server.tls_accept import TlsAcceptor

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="it makes certificates")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@contextmanager
def https(authority: Authority, name: str = "server", **keys: Any) -> Iterator[Live]:
    cert, key = authority.issue(name)
    tls = TlsConfig(cert=str(cert), key=str(key), **{"reload_seconds": 0.01, **keys})
    with Live(tls=tls) as live:
        assert live.url.startswith("https://127.0.0.1:")
        yield live


def serial(live: Live, authority: Authority) -> str:
    """Of the certificate that a new connection gets."""
    with (
        connect(live) as plain,
        authority.context().wrap_socket(plain, server_hostname=HOST) as tls,
    ):
        found = tls.getpeercert()
        assert found is not None
        return str(found["serialNumber"])


def connect(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=60)


def test_clients_ask_over_tls(authority: Authority) -> None:
    with https(authority) as live:
        with (
            httpx.Client(base_url=live.url, verify=authority.context()) as client,
            httpx2.Client(verify=authority.context()) as theirs,
            openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", http_client=theirs) as typed,
        ):
            for path in ("/health", "/livez", "/metrics"):
                assert client.get(path).status_code == 200
            whole = client.post(CHAT, json=chat("x" * 100, max_tokens=100))
            assert whole.json()["choices"][0]["message"]["content"] == "x" * 100
            refused = client.post(CHAT, json=chat(temperature=-1))
            assert (refused.status_code, "x-request-id" in refused.headers) == (400, True)
            stream = typed.chat.completions.create(
                model="echo",
                messages=[{"role": "user", "content": "hello"}],
                max_tokens=5,
                stream=True,
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert text == "hello"
        with pytest.raises(httpx.ConnectError):  # who knows nothing of the authority
            httpx.get(f"{live.url}/health")


def test_a_new_certificate_serves_new_connections(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with https(authority, "renewed") as live:
        before = serial(live, authority)
        with httpx.Client(base_url=live.url, verify=authority.context()) as client:
            assert client.get("/livez").status_code == 200
            cert, key = authority.issue("renewed")
            wait_until(lambda: serial(live, authority) != before)
            after = serial(live, authority)
            assert client.get("/livez").status_code == 200, "an open connection goes on"
            other, _ = authority.issue("other")
            os.replace(other, cert)  # and its key does not come
            wait_until(lambda: "is not used" in caplog.text)
            assert serial(live, authority) == after
            assert f"server.tls.key={key}: this key does not belong" in caplog.text
            cert.unlink()
            wait_until(lambda: "No such file" in caplog.text)
            assert serial(live, authority) == after
            authority.issue("renewed")
            wait_until(lambda: serial(live, authority) != after)


def test_a_key_that_vanishes_between_two_looks(
    authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = authority.issue("vanishing")
    tls = Tls(TlsConfig(cert=str(cert), key=str(key)))
    before, read = tls.context, tls_module._read

    def read_and_remove(name: str, file: Path) -> str:
        text = read(name, file)
        file.unlink()
        return text

    monkeypatch.setattr(tls_module, "_read", read_and_remove)
    authority.issue("vanishing")
    tls.refresh()
    assert tls.context is before
    assert "is not used" in caplog.text


def test_a_stream_outlives_its_certificate(authority: Authority) -> None:
    cert, key = authority.issue("streamed")
    tls = TlsConfig(cert=str(cert), key=str(key), reload_seconds=0.01)
    with Live(tls=tls, engine={"patience": 2}) as live:
        before = serial(live, authority)
        with (
            httpx.Client(base_url=live.url, verify=authority.context()) as client,
            client.stream("POST", CHAT, json=chat("abcd", max_tokens=4, stream=True)) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            authority.issue("streamed")
            wait_until(lambda: serial(live, authority) != before)
            live.call(live.engine.go_on.set)
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_clients_show_certificates(authority: Authority, tmp_path: Path) -> None:
    strangers = Authority(tmp_path)
    with https(authority, "mutual", client_ca=str(authority.file)) as live:
        mine = authority.context(authority.issue("client"))
        assert httpx.get(f"{live.url}/health", verify=mine).status_code == 200
        for context in (authority.context(), authority.context(strangers.issue("stranger"))):
            with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
                httpx.get(f"{live.url}/health", verify=context)
        assert httpx.get(f"{live.url}/health", verify=mine).status_code == 200


def test_old_versions_are_refused(authority: Authority) -> None:
    with https(authority, "modern", min_version=1.3) as live:
        old = authority.context()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with connect(live) as plain, pytest.raises(ssl.SSLError):
            old.wrap_socket(plain, server_hostname=HOST)
        assert serial(live, authority)


def test_plain_http_is_told(authority: Authority) -> None:
    with https(authority, "plain") as live:
        with connect(live) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            status, error = error_of(read_to_end(plain))
        assert (status, error["code"]) == (400, "use_https")
        with connect(live) as noise:
            noise.sendall(b"\x00\x01\x02")
            with suppress(ConnectionResetError):  # the server has not read all of it
                assert read_to_end(noise) == b""
        assert serial(live, authority)


@pytest.mark.parametrize("begin", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00"])
def test_a_slow_handshake_ends(begin: bytes, authority: Authority) -> None:
    with https(authority, "slow", handshake_seconds=0.2) as live, connect(live) as slow:
        slow.sendall(begin)
        wait_until(lambda: _is_greeted(live, authority))  # others go on meanwhile
        assert read_to_end(slow) == b""


def test_handshakes_count_as_connections(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = authority.issue("full")
    with Live(tls=TlsConfig(cert=str(cert), key=str(key)), max_connections=1) as live:
        silent = [connect(live) for _ in range(80)]
        wait_until(lambda: "too many are open" in caplog.text)
        for one in silent:
            one.close()
        wait_until(lambda: _is_well(live, authority))


def test_many_that_connect_at_once_leave_the_loop_its_turns(authority: Authority) -> None:
    cert, key = authority.issue("flood")
    turns: list[int] = []

    async def test() -> None:
        loop, asked = asyncio.get_running_loop(), 0

        def has_room(num_greeting: int) -> bool:
            nonlocal asked
            asked += 1
            return False

        def turn() -> None:
            nonlocal asked
            turns.append(asked)
            asked = 0
            if sum(turns) < len(clients):
                loop.call_soon(turn)

        with socket.create_server((HOST, 0), backlog=128) as listening, ExitStack() as stack:
            address = listening.getsockname()
            clients = [stack.enter_context(socket.create_connection(address)) for _ in range(100)]
            tls = Tls(TlsConfig(cert=str(cert), key=str(key)))
            acceptor = TlsAcceptor(listening, tls, asyncio.Protocol, has_room)
            loop.call_soon(turn)
            while sum(turns) < len(clients):
                await asyncio.sleep(0)
            acceptor.close()
            await acceptor.wait_closed()

    asyncio.run(test())
    assert max(turns) <= ACCEPTED_AT_ONCE


def _is_greeted(live: Live, authority: Authority) -> bool:
    """Whether a handshake was in time, which it may not be on a busy machine."""
    with suppress(OSError):
        return bool(serial(live, authority))
    return False


def _is_well(live: Live, authority: Authority) -> bool:
    try:
        url = f"{live.url}/livez"
        return httpx.get(url, verify=authority.context()).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_request_that_is_cut_off_over_tls(authority: Authority) -> None:
    """A refusal by the connection itself: TLS cannot close one direction alone."""
    with https(authority, "invalid") as live:
        context = authority.context()
        with connect(live) as plain, context.wrap_socket(plain, server_hostname=HOST) as tls:
            tls.sendall(b"nonsense\r\n\r\n")
            status, error = error_of(read_to_end(tls))
        assert (status, error["code"]) == (400, "invalid_http")


def test_a_unix_socket_stays_plain(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = authority.issue("unix")
    path = str(tmp_path / "s")
    with Live(tls=TlsConfig(cert=str(cert), key=str(key)), unix_socket=path):
        transport = httpx.HTTPTransport(uds=path)
        with httpx.Client(transport=transport, base_url="http://x") as client:
            assert client.get("/livez").status_code == 200
    assert "server.unix_socket speaks plain HTTP" in caplog.text


# -- files ----------------------------------------------------------------------------------------


def refusal(**keys: Any) -> str:
    """What is said of keys that cannot serve."""
    values: dict[str, Any] = {key: str(value) for key, value in keys.items()}
    config = TlsConfig(**values)

    def begin() -> None:
        config.check()
        Tls(config)

    with pytest.raises(ConfigError) as caught:
        begin()
    return str(caught.value)


def test_files_that_cannot_serve(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("good")
    _, foreign = authority.issue("foreign")
    none, text = tmp_path / "none.pem", tmp_path / "text.pem"
    text.write_text("hello")
    says = refusal(cert=none, key=key)
    assert says == f"server.tls.cert={none}: the file cannot be read: No such file or directory"
    assert f"server.tls.key={none}: the file cannot" in refusal(cert=cert, key=none)
    assert f"server.tls.cert={tmp_path}: the file cannot" in refusal(cert=tmp_path, key=key)
    assert f"server.tls.cert={text}: expected a certificate" in refusal(cert=text, key=key)
    assert f"server.tls.key={text}: expected a private key" in refusal(cert=cert, key=text)
    assert f"server.tls.cert={cert}: expected a private key" in refusal(cert=cert)
    assert f"server.tls.key={foreign}: this key does not belong" in refusal(cert=cert, key=foreign)
    assert f"server.tls.client_ca={text}: no cert" in refusal(cert=cert, key=key, client_ca=text)
    assert "server.tls.min_version=1.1: expected 1.2 or 1.3" in refusal(cert=cert, min_version=1.1)
    assert "server.tls.key=k: there is no certificate" in refusal(key="k")
    assert "server.tls.client_ca=c: there is no certificate" in refusal(client_ca="c")
    damaged = cert.read_text().splitlines()
    text.write_text("\n".join([damaged[0], damaged[2], *damaged[3:]]))
    assert f"server.tls.cert={text}: " in refusal(cert=text, key=key)


def test_an_encrypted_key_asks_nobody(authority: Authority) -> None:
    cert, key = authority.issue("locked")
    authority.encrypt(key)
    assert f"server.tls.key={key}: the key is encrypted" in refusal(cert=cert, key=key)


def test_one_file_for_both(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("both")
    both = tmp_path / "both.pem"
    both.touch(mode=0o600)
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    assert Tls(TlsConfig(cert=str(both))).context.cert_store_stats()["x509"] == 0


def test_warnings_of_files(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = authority.issue("dates", days=1)
    Tls(TlsConfig(cert=str(cert), key=str(key)))
    assert caplog.text == ""
    cert, key = authority.issue("dates", days=-1)
    key.chmod(0o644)
    Tls(TlsConfig(cert=str(cert), key=str(key)))
    expired, readable = (record.getMessage() for record in caplog.records)
    assert f"server.tls.cert={cert} expired on {not_after(cert.read_text()):%Y-%m-%d}" in expired
    assert f"server.tls.key={key} can be read by every user" in readable
    assert stat.S_IMODE(key.stat().st_mode) == 0o644
    assert caplog.records[0].levelno == logging.WARNING


def test_far_dates(authority: Authority) -> None:
    """From 2050 on certificates write years with four digits (RFC 5280, 4.1.2.5)."""
    now = datetime.now(UTC)
    for days in (-1, 1, (datetime(2049, 7, 8, tzinfo=UTC) - now).days, 15_000, 30_000):
        begin = datetime.now(UTC).replace(microsecond=0) + timedelta(days)
        cert, _ = authority.issue("far", days=days)
        end = datetime.now(UTC) + timedelta(days)
        assert begin <= not_after(cert.read_text()) <= end
