"""What ``/proc`` says of open ports."""

from __future__ import annotations

import os
import socket

import pytest

from vllm_di.components import listening
from vllm_di.components.listening import Port, beyond


def test_a_listening_socket_is_found_with_its_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = [p for p in listening.listening({os.getpid()}) if p.port == port]
        assert [p.address for p in found] == ["127.0.0.1"]
        assert f"({os.getpid()}) on 127.0.0.1:{port}" in str(found[0])
    assert port not in [p.port for p in listening.listening({os.getpid()})]


def test_this_process_is_found_by_its_command_line() -> None:
    assert os.getpid() in listening.processes_of("pytest")
    assert "127.0.0.1" in listening.own_addresses()


@pytest.mark.parametrize(
    ("own", "address", "is_beyond"),
    [
        (["127.0.0.1", "10.0.0.1"], "127.0.0.1", False),
        (["127.0.0.1", "10.0.0.1"], "10.0.0.1", False),
        (["127.0.0.1", "10.0.0.1"], "0.0.0.0", False),
        (["127.0.0.1", "10.0.0.1", "192.0.2.1"], "0.0.0.0", True),
        (["127.0.0.1", "10.0.0.1", "192.0.2.1"], "192.0.2.1", True),
        (["127.0.0.1", "10.0.0.1", "192.0.2.1"], "10.0.0.1", False),
        (["127.0.0.1", "10.0.0.1", "2001:db8::1"], "0.0.0.0", False),
        (["127.0.0.1", "10.0.0.1", "2001:db8::1"], "::", True),
    ],
)
def test_ports_beyond_a_node_address(
    own: list[str], address: str, is_beyond: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "own_addresses", lambda: own)
    port = Port(address, 6379, "gcs_server (1)")
    assert beyond([port], "10.0.0.1") == ([port] if is_beyond else [])
