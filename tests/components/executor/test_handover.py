"""What crosses between two workers, block by block, and the way of the bytes."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
from tests.components.executor.nixl import needs_nixl
from tests.components.scheduler.fakes import report
from tests.components.test_lines import certificates
from tests.test_sockets import addresses, is_loopback

from vllm_di.components.executor.lanes import Lane, Offer
from vllm_di.components.executor.roles import Sides
from vllm_di.components.executor.sequence_book import SequenceBook
from vllm_di.components.executor.side_blocks import BlockLedger, SideBlocks
from vllm_di.components.interfaces import Executor, KvTransfer, Placement, WorkerLauncher
from vllm_di.components.kv_transfer.nixl import NixlTransfer
from vllm_di.components.kv_transfer.none import NoKvTransfer
from vllm_di.components.kv_transfer.shared_memory import SharedMemoryTransfer
from vllm_di.components.kv_transfer.tcp import TcpTransfer
from vllm_di.components.messages import (
    KvGroup,
    KvParcel,
    KvSpan,
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    StepPlan,
    WorkerReport,
)
from vllm_di.errors import ConfigError, EngineDeadError, PortError


def test_a_ledger_counts_what_each_side_holds() -> None:
    ledger = BlockLedger(4, 3)
    ledger.run(1, 2, 0, 20)
    old = ledger.held(0, 2, 20)
    ledger.receive(0, old)
    assert [ledger.tokens(side, 2) for side in range(3)] == [20, 20, 0]
    ledger.run(0, 2, 20, 24)
    ledger.run(0, 2, 21, 22)  # the guesses behind the first were wrong
    assert [ledger.tokens(side, 2) for side in range(3)] == [22, 20, 0]
    ledger.run(0, 2, 18, 19)
    assert ledger.tokens(1, 2) == 18
    ledger.renew(2)
    assert not ledger.is_current(old) and ledger.is_current(ledger.held(0, 2, 1))
    assert [ledger.tokens(side, 2) for side in range(3)] == [0, 0, 0]


def test_blocks_of_two_sizes_cross_in_one_order() -> None:
    ledger = BlockLedger(9, 2)
    held = [ledger.held(1, 7, 32), ledger.held(0, 5, 20), ledger.held(0, 3, 32)]
    small, large = SideBlocks(32, 16, 100), SideBlocks(32, 32, 100)
    assert small.spans(held) == [
        KvSpan(0, [6, 7], 32),
        KvSpan(0, [10, 11], 20),
        KvSpan(1, [14, 15], 32),
    ]
    assert large.spans(held, skipped=held[:1]) == [
        KvSpan(0, [3], 32),
        KvSpan(0, [5], 20),
        KvSpan(1, [-1], 32),
    ]
    assert small.table([2, -1]) == [4, 5, -1, -1]
    assert small.table([0, 1, 2, 3]) == [0, 1, 2, 3, 4, 5, 6]  # 100 tokens need no more
    assert small.table([3], first=6) == [6] and not small.table([3], first=7)


def test_a_lane_that_has_a_sequence_looks_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of decoding costs the same behind a long context as behind a short one."""
    book = SequenceBook([KvGroup([0])], 16, 10, 2)
    one, other = (Lane(str(index), index, cast(Executor, None)) for index in range(2))
    one.blocks = other.blocks = SideBlocks(16, 16, 160)
    new = NewSequence(seq_id=1, token_ids=[7] * 100, prompt_len=100, params=SamplingParams())
    prompt = ScheduledSequence(1, 0, 100, [list(range(7))], [], True, True)
    book.begin(StepPlan(1, [new], [prompt], []))
    book.hand_on(one, prompt, again=False)
    assert len(book.lacking(other, 1, 100)) == 7
    monkeypatch.setattr(book, "ledger", None)
    assert book.lacking(one, 1, 100) == []


def test_an_offer_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not before it is there: tickets are used again."""
    lane = Lane("decode", 0, cast(Executor, None))
    given: list[Sequence[KvParcel]] = []
    monkeypatch.setattr(lane, "release", given.append)
    offer, lost = Offer(lane, []), Offer(lane, [])
    for one in (offer, offer, lost):
        one.release()
    assert not given
    offer.parcels.set_result([KvParcel("ticket", [])])
    lost.lost(EngineDeadError("the workers are closed"))
    offer.release()
    assert given == [[KvParcel("ticket", [])]]


class TwoRoles(WorkerLauncher):
    def for_role(self, role: str) -> WorkerLauncher:
        return self

    def open(self, placement: Placement) -> Any:
        raise AssertionError("no worker is started")

    def command(self, placement: Placement, address: str) -> Any:
        raise AssertionError("no worker is started")


@pytest.mark.parametrize(
    ("ranks", "num_prefill", "fits"), [(1, 2, True), (1, 3, False), (2, 2, True), (2, 3, False)]
)
def test_all_lanes_share_the_memory_of_the_host(ranks: int, num_prefill: int, fits: bool) -> None:
    """Each wants 0.3 of what is free, as each found it."""

    def of(ranks: int) -> WorkerReport:
        memory = {"memory_free": (1 << 30) // ranks}
        one = report(num_blocks=300_000 // ranks)
        return msgspec.structs.replace(one, bytes_per_block=1074, device="cpu", details=memory)

    decode, prefill = of(ranks), of(1)
    sides = Sides(TwoRoles(), {"decode": ranks, "prefill": 1}, decode, prefill)
    reports = [decode, *[prefill] * num_prefill]
    if fits:
        return sides.check_room(reports)
    words = r"worker: the workers of both roles want 1\.20 GiB .* but 1\.00 GiB are free"
    with pytest.raises(ConfigError, match=words):
        sides.check_room(reports)
    return None


NIXL = pytest.param("nixl", marks=needs_nixl)


def transfers(kind: str) -> tuple[KvTransfer, KvTransfer]:
    if kind == "nixl":
        return NixlTransfer(devices=["lo"], timeout=5), NixlTransfer(devices=["lo"], timeout=5)
    if kind == "tcp":
        one, other = (TcpTransfer(bind=None, secret_file=None, tls=None, timeout=5) for _ in "12")
        return one, other
    return SharedMemoryTransfer(), SharedMemoryTransfer()


@pytest.mark.parametrize("kind", ["tcp", "shared_memory", NIXL])
def test_bytes_arrive(kind: str) -> None:
    sender, receiver = transfers(kind)
    for one in (sender, receiver):
        one.open(b"s" * 32)
    try:
        for size in (1, 5000, 3_000_000):
            ticket, memory = sender.offer(size)
            memory[:] = bytes(index % 251 for index in range(size))
            for _ in range(2):  # several may take it
                with receiver.take(ticket) as data:
                    assert data == memory
            memory.release()
            sender.withdraw(ticket)
            sender.withdraw(ticket)
        with pytest.raises(PortError, match=f"is no ticket of kv_transfer={kind}"):
            receiver.take("of another kind").__enter__()
    finally:
        receiver.close()
        sender.close()
    with pytest.raises(EngineDeadError), receiver.take(ticket):
        pass


@pytest.mark.parametrize("kind", ["tcp", "shared_memory", NIXL])
def test_an_error_of_the_taker_is_its_own(kind: str) -> None:
    """Also while it holds views of the bytes, as a tensor over them does."""

    def fail(data: memoryview) -> None:
        values = torch.frombuffer(data[4:], dtype=torch.uint8)
        raise PortError(f"no parcel holds head {values.numel()}")

    sender, receiver = transfers(kind)
    for one in (sender, receiver):
        one.open(b"s" * 32)
    try:
        ticket, _ = sender.offer(64)
        with (
            pytest.raises(PortError, match="no parcel holds head 60"),
            receiver.take(ticket) as data,
        ):
            fail(data)
    finally:
        receiver.close()
        sender.close()


def listening() -> set[str]:
    """Addresses on which this machine listens, in the kernel's hexadecimal."""
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        if (table := Path(f"/proc/net/{name}")).exists()
        for line in table.read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A"}


def test_tcp_listens_on_loopback_alone_and_only_with_an_offer() -> None:
    sender, _ = transfers("tcp")
    sender.open(b"s" * 32)
    ticket, _ = sender.offer(8)
    try:
        port = f"{int(ticket.split(' ')[1]):04X}"
        assert {a for a in listening() if a.endswith(f":{port}")} == {f"0100007F:{port}"}
    finally:
        sender.close()
    assert not {a for a in listening() if a.endswith(f":{port}")}


@needs_nixl
def test_nixl_listens_on_loopback_alone() -> None:
    before = set(addresses(os.getpid(), listening=True))
    one, _ = transfers("nixl")
    one.open(b"s" * 32)
    try:
        found = set(addresses(os.getpid(), listening=True)) - before
        assert found and all(is_loopback(address) for address, _ in found)
    finally:
        one.close()


def test_nixl_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="devices: name one network device"):
        NixlTransfer(devices=[], timeout=5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    NixlTransfer(devices=["lo"], timeout=5).check()
    assert not caplog.messages
    NixlTransfer(devices=["eth0"], timeout=5).check()
    assert "listens on eth0: UCX neither encrypts" in caplog.text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vllm-di\[nixl\]'; or take kv_transfer"):
        NixlTransfer(devices=["lo"], timeout=5).check()


def test_nixl_keeps_memory_that_a_failed_transfer_may_still_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise TimeoutError("not read within 5 s")

    one = NixlTransfer(devices=["lo"], timeout=5)
    region: Any = SimpleNamespace(memory=bytearray(8))
    monkeypatch.setattr(one, "_agent", SimpleNamespace(add_remote_agent=lambda described: None))
    monkeypatch.setattr(one, "_region", lambda size: region)
    monkeypatch.setattr(one, "_copy", fail)
    with (
        pytest.raises(EngineDeadError, match="worker a offered: TimeoutError: not read"),
        one.take("1 8 a 0"),
    ):
        pass
    assert one._unfinished == [region] and not one._idle


def test_tcp_gives_nothing_to_whoever_does_not_know_the_session() -> None:
    sender, stranger = transfers("tcp")
    sender.open(b"s" * 32)
    stranger.open(b"x" * 32)
    ticket, memory = sender.offer(64)
    memory[:] = b"secretly" * 8
    try:
        with pytest.raises(EngineDeadError, match="does not know this engine's key"):
            stranger.take(ticket).__enter__()
        _, port, number, _ = ticket.split(" ")
        with socket.create_connection(("127.0.0.1", int(port)), 5) as sock:
            sock.sendall(b"\0" * 64 + int(number).to_bytes(8, "little"))  # no proof, and a ticket
            said = b""
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(4096):
                    said += part
        assert b"secretly" not in said and len(said) <= 64
    finally:
        stranger.close()
        sender.close()


def test_tcp_keeps_few_connections_that_are_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_di.components.kv_transfer.tcp.MOST_UNPROVEN", 2)
    sender, receiver = transfers("tcp")
    for one in (sender, receiver):
        one.open(b"s" * 32)
    ticket, _ = sender.offer(8)
    address = ("127.0.0.1", int(ticket.split(" ")[1]))
    try:
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(socket.create_connection(address, 5)) for _ in range(3)]
            assert [len(sock.recv(1)) for sock in silent] == [1, 1, 0]  # a challenge, or nothing
        for _ in range(100):  # their threads end by and by
            with contextlib.suppress(EngineDeadError), receiver.take(ticket):
                return
            time.sleep(0.05)
        pytest.fail("no place is left")
    finally:
        receiver.close()
        sender.close()


def test_tcp_is_encrypted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A taker with a certificate of another authority gets nothing, and the rest goes on."""
    ours = [certificates(tmp_path, name, "ours") for name in ("one", "two")]
    theirs = certificates(tmp_path, "three", "theirs")
    sender, taker, stranger = (
        TcpTransfer(bind=None, secret_file=None, tls=tls, timeout=5) for tls in (*ours, theirs)
    )
    for each in (sender, taker, stranger):
        each.check()
        each.open(b"s" * 32)
    ticket, memory = sender.offer(300_000)
    memory[:] = os.urandom(300_000)
    try:
        with pytest.raises(EngineDeadError, match="certificate"), stranger.take(ticket):
            pass
        with taker.take(ticket) as data:
            assert data == memory
    finally:
        memory.release()
        for each in (taker, stranger, sender):
            each.close()


def test_tcp_is_told_where_it_is(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.touch(0o600)
    file.write_bytes(os.urandom(32))
    made = TcpTransfer(bind=None, secret_file=str(file), tls=None, timeout=5)
    made.check_hosts(["192.0.2.1", "192.0.2.2"])
    made.settle("127.0.0.2")
    made.open(b"s" * 32)
    ticket, _ = made.offer(1)
    assert ticket.startswith("127.0.0.2 ")
    made.close()
    fixed = TcpTransfer(bind="127.0.0.1", secret_file=None, tls=None, timeout=5)
    fixed.check_hosts(["127.0.0.1", "127.0.0.1"])
    with pytest.raises(ConfigError, match=r"on several hosts \(192.0.2.1, 192.0.2.2\)"):
        fixed.check_hosts(["192.0.2.1", "192.0.2.2"])
    with pytest.raises(ConfigError, match="does not say that it reaches other hosts"):
        NoKvTransfer().check_hosts(["192.0.2.1", "192.0.2.2"])


def test_tcp_says_when_it_listens_no_more(caplog: pytest.LogCaptureFixture) -> None:
    class Full(socket.socket):
        def accept(self) -> Any:
            raise OSError(24, "Too many open files")

    sender, _ = transfers("tcp")
    assert isinstance(sender, TcpTransfer)
    with Full() as listener:
        sender._accept(listener)
    assert "no further worker can take the KV cache" in caplog.text
    caplog.clear()
    sender.offer(1)
    sender.close()
    assert not caplog.messages


def test_a_secret_file_must_be_the_owners_own(tmp_path: Path) -> None:
    def made(**values: Any) -> TcpTransfer:
        return TcpTransfer(**{"bind": "127.0.0.1", "tls": None, "timeout": 5, **values})

    file = tmp_path / "secret"
    file.write_bytes(os.urandom(32))
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=f"is open to others; chmod 600 {file}"):
        made(secret_file=str(file))
    file.chmod(0o600)
    one, other = made(secret_file=str(file)), made(secret_file=None)
    for each in (one, other):
        each.open(b"s" * 32)
    ticket, _ = one.offer(4)
    try:
        with pytest.raises(EngineDeadError, match="does not know"):
            other.take(ticket).__enter__()
    finally:
        other.close()
        one.close()
    file.write_bytes(b"short")
    with pytest.raises(ConfigError, match="has 5 bytes, and needs 32"):
        made(secret_file=str(file))
    made(secret_file=None, bind="::1").close()
