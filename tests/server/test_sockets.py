"""Whose address it is: taken ones are errors, dead ones are replaced, others' are left alone."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from contextlib import closing
from pathlib import Path

import pytest

from vllm_di.errors import ConfigError
from vllm_di.server import sockets
from vllm_di.server.sockets import check_address, listen

HOST = "127.0.0.1"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def listen_unix(path: str) -> sockets.Listening:
    return listen(HOST, 0, path)


def connects(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
    return True


def test_a_living_server_keeps_its_path(path: str) -> None:
    with closing(listen_unix(path)):
        for attempt in (listen_unix, lambda path: check_address(HOST, 0, path)):
            with pytest.raises(ConfigError, match=rf"unix_socket={path}: another server listens"):
                attempt(path)
        assert connects(path)
    assert not os.path.lexists(path)


def test_a_server_that_is_busy_or_stopped_is_living(path: str) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as busy:
        busy.bind(path)
        busy.listen(0)  # nothing is ever accepted, so the backlog is full at once
        waiting = []
        while True:
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            waiting.append(client)
            try:
                client.connect(path)
            except BlockingIOError:
                break
        with pytest.raises(ConfigError, match="another server listens"):
            listen_unix(path)
        for client in waiting:
            client.close()


def test_a_dead_servers_socket_is_replaced(path: str) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(path)
    dead.listen()
    dead.close()
    check_address(HOST, 0, path)
    assert os.path.lexists(path), "a check changes nothing"
    with closing(listen_unix(path)):
        assert connects(path)
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600


def test_the_end_removes_only_ones_own_file(path: str) -> None:
    first = listen_unix(path)
    os.unlink(path)  # as another program may
    second = listen_unix(path)
    first.close()
    assert connects(path)
    second.close()
    assert not os.path.lexists(path)
    second.close()  # the second time there is nothing to do


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling"])
def test_what_is_no_socket_stays(path: str, kind: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with closing(listen_unix(str(other))):
        if kind == "file":
            Path(path).write_text("text")
        elif kind == "folder":
            os.mkdir(path)
        else:
            os.symlink(other if kind == "link" else tmp_path / "nothing", path)
        with pytest.raises(ConfigError, match="not a socket"):
            listen_unix(path)
        assert os.path.lexists(path)


@pytest.mark.parametrize("name", ["no/such/folder/s", "x" * 200])
def test_a_useless_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.unix_socket=.*cannot listen there"):
        listen_unix(str(tmp_path / name))


def test_starts_at_the_same_moment_take_turns(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_LOCK_SECONDS", 0.0)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="lock"):
        listen_unix(path)
    os.close(folder)
    listen_unix(path).close()


def test_a_taken_port_names_a_free_one() -> None:
    with closing(listen(HOST, 0, None)) as first:
        port = int(first.address.rpartition(":")[2])
        for attempt in (listen, check_address):
            with pytest.raises(ConfigError, match=rf"server\.port={port}: .*already; ") as caught:
                attempt(HOST, port, None)
            assert "server.port=0 picks a free one" in str(caught.value)
            assert "\n" not in str(caught.value)
    check_address(HOST, port, None)
    check_address(HOST, port, None)  # it leaves the port free


def test_addresses_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"server\.host=192\.0\.2\.1: .*no such address"):
        listen("192.0.2.1", 0, None)
    with pytest.raises(ConfigError, match=r"server\.host=no host:"):
        listen("no host", 0, None)


def test_ipv6() -> None:
    try:
        six = listen("::1", 0, None)
    except ConfigError as error:
        pytest.skip(str(error))
    with closing(six):
        assert six.address.startswith("http://[::1]:")
