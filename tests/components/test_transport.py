"""Frames over Unix sockets."""

from __future__ import annotations

import ast
import socket
import stat
from pathlib import Path

import msgspec
import pytest

import vllm_di
from vllm_di.components.transport import Codec, Connection, Failure, Rendezvous, connect
from vllm_di.errors import ConfigError, EngineDeadError, RequestError


class Note(msgspec.Struct, tag=True):
    text: str


def pair() -> tuple[Connection[Note], Connection[Note]]:
    left, right = socket.socketpair()
    codec: Codec[Note] = Codec(Note)
    return Connection(left, codec), Connection(right, codec)


def test_messages_arrive_whole_and_in_order() -> None:
    left, right = pair()
    for size in (0, 1, 100_000):
        left.send(Note("x" * size))
    assert [len(right.receive().text) for _ in range(3)] == [0, 1, 100_000]
    left.close()
    with pytest.raises(EngineDeadError, match="closed the connection"):
        right.receive()
    right.close()


def test_what_the_conversation_does_not_know_is_refused() -> None:
    left, right = pair()
    left.send(Failure("X", "y"))
    with pytest.raises(msgspec.ValidationError):
        right.receive()
    left.socket.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(EngineDeadError, match="4294967295 bytes"):
        right.receive()
    left.close()
    right.close()


def test_the_socket_belongs_to_the_user_alone() -> None:
    rendezvous = Rendezvous()
    path = Path(rendezvous.address)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    connect(rendezvous.address).close()
    rendezvous.close()
    assert not path.parent.exists()


def test_errors_keep_their_class() -> None:
    assert type(Failure.of(ConfigError("bad")).error()) is ConfigError
    assert type(Failure.of(RequestError("bad", param="x")).error()) is RequestError
    foreign = Failure.of(ZeroDivisionError("oops")).error()
    assert type(foreign) is EngineDeadError
    assert "ZeroDivisionError: oops" in str(foreign)
    assert "Traceback" not in str(foreign)


def test_nothing_in_the_package_can_unpickle() -> None:
    bad = {"pickle", "marshal", "dill", "cloudpickle", "shelve", "joblib"}
    for file in Path(vllm_di.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not bad & {n.split(".")[0] for n in names}, file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), file
