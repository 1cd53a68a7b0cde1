"""Lines between hosts: who gets one, and what goes over it."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vllm_di.components import proof
from vllm_di.components.lines import Line, LineListener, Tls, descriptor
from vllm_di.components.meeting import Add, Attendee, Get, Meeting, Put
from vllm_di.errors import ConfigError

SESSION = bytes(range(32))


def secret(path: Path, byte: int = 7) -> str:
    path.touch(0o600)
    path.write_bytes(bytes([byte]) * 32)
    return str(path)


def both(listener: LineListener, connect: Callable[[], Any]) -> tuple[socket.socket | None, Any]:
    """What each end has of one attempt: a socket, or the error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(connect())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    accepted = listener.accept()
    thread.join(20)
    return accepted, found[0]


def certificates(folder: Path, name: str, authority: str) -> Tls:
    """Of a host, signed by an authority that is made when it is first named."""
    run = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    run += ["-nodes", "-days", "2"]
    ca, ca_key = folder / f"{authority}.pem", folder / f"{authority}.key"
    own, own_key = folder / f"{name}.pem", folder / f"{name}.key"
    if not ca.exists():
        files = ["-keyout", str(ca_key), "-out", str(ca), "-subj", f"/CN={authority}"]
        subprocess.run([*run, *files], check=True, capture_output=True)
    files = ["-keyout", str(own_key), "-out", str(own), "-subj", f"/CN={name}"]
    files += ["-CA", str(ca), "-CAkey", str(ca_key)]
    subprocess.run([*run, *files], check=True, capture_output=True)
    return Tls(str(own), str(own_key), str(ca))


def test_both_ends_know_the_session(tmp_path: Path) -> None:
    file = secret(tmp_path / "secret")
    listener = LineListener("127.0.0.1", SESSION, secret_file=file)
    line = msgspec.json.decode(msgspec.json.encode(listener.line), type=Line)
    ours, theirs = both(listener, line.connect)
    assert ours is not None
    ours.sendall(b"step")
    assert theirs.recv(4) == b"step"
    listener.close()
    ours.close()
    theirs.close()


@pytest.mark.parametrize("what", ["session", "secret", "no secret", "nothing"])
def test_whoever_does_not_know_the_key_gets_no_line(what: str, tmp_path: Path) -> None:
    listener = LineListener("127.0.0.1", SESSION, secret_file=secret(tmp_path / "ours"))
    line = listener.line
    if what == "session":
        line = msgspec.structs.replace(line, session=bytes(32))
    elif what == "secret":
        line = msgspec.structs.replace(line, secret_file=secret(tmp_path / "theirs", 8))
    elif what == "no secret":
        line = msgspec.structs.replace(line, secret_file=None)
    if what == "nothing":

        def knock() -> None:
            socket.create_connection((line.address, line.port)).close()

        ours, theirs = both(listener, knock)
        assert theirs is None
    else:
        ours, theirs = both(listener, line.connect)
        assert isinstance(theirs, ConfigError)
        assert theirs.key == "cluster.secret_file"
    assert ours is None
    assert listener.refused is not None
    assert "127.0.0.1 was refused" in listener.refused
    listener.close()


def test_an_answer_is_of_no_use_to_the_other_side() -> None:
    """Whoever sends an engine's own words back knows nothing."""
    left, right = socket.socketpair()
    key = proof.make_key(SESSION, b"")

    def echo() -> None:
        while data := right.recv(4096):
            right.sendall(data)

    thread = threading.Thread(target=echo)
    thread.start()
    with pytest.raises(PermissionError):
        proof.prove(left, key, b"engine", b"worker")
    left.close()
    thread.join(20)
    right.close()


@pytest.mark.parametrize(
    ("bind", "words"),
    [
        ("10.1.2.3", "bind=10.1.2.3 can be reached from other machines: set secret_file too"),
        ("0.0.0.0", "listens everywhere"),
        ("localhost", "is no IP address"),
    ],
)
def test_addresses_that_are_not_listened_on(bind: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LineListener(bind, SESSION)


def test_an_address_of_another_host(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster.bind: 203.0.113.9: .*name an address of this"):
        LineListener("203.0.113.9", SESSION, secret_file=secret(tmp_path / "secret"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b"short") and path.chmod(0o600), "has 5 bytes"),
        (lambda path: path.write_bytes(bytes(32)) and path.chmod(0o644), "is open to others"),
    ],
)
def test_secret_files_that_are_none(
    make: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    make(tmp_path / "secret")
    with pytest.raises(ConfigError, match=f"cluster.secret_file: .*{words}"):
        LineListener("127.0.0.1", SESSION, secret_file=str(tmp_path / "secret"))


def test_tls_carries_calls_and_the_meeting(tmp_path: Path) -> None:
    engine = certificates(tmp_path, "engine", "authority")
    listener = LineListener("127.0.0.1", SESSION, tls=engine)
    line = msgspec.structs.replace(listener.line, tls=certificates(tmp_path, "worker", "authority"))
    ours, theirs = both(listener, line.connect)
    assert ours is not None
    meeting = Meeting()
    meeting.serve(ours)
    attendee = Attendee(socket.socket(fileno=descriptor(theirs)))
    attendee.ask(Put("where", b"here"))
    assert attendee.ask(Get("where", 1.0)) == b"here"
    meeting.close()
    attendee.close()
    theirs.close()
    listener.close()


def test_tls_of_another_authority_is_refused(tmp_path: Path) -> None:
    listener = LineListener("127.0.0.1", SESSION, tls=certificates(tmp_path, "engine", "authority"))
    stranger = certificates(tmp_path, "stranger", "elsewhere")
    ours, theirs = both(listener, msgspec.structs.replace(listener.line, tls=stranger).connect)
    assert ours is None
    assert isinstance(theirs, ConfigError)
    assert theirs.key == "cluster.tls"
    listener.close()


def test_ranks_meet_by_keys() -> None:
    meeting = Meeting()
    ends = [socket.socketpair() for _ in range(2)]
    for ours, _ in ends:
        meeting.serve(ours)
    one, two = (Attendee(theirs) for _, theirs in ends)
    assert two.ask(Get("address", 0.01)) is None
    found: list[bytes | None] = []
    waiter = threading.Thread(target=lambda: found.append(two.ask(Get("address", 20.0))))
    waiter.start()
    one.ask(Put("address", b"10.0.0.1"))
    waiter.join(20)
    assert found == [b"10.0.0.1"]
    assert [one.ask(Add("n", 1)), two.ask(Add("n", 2)), one.ask(Add("n", 0))] == [b"1", b"3", b"3"]
    meeting.close()
    for end in (one, two):
        end.close()
