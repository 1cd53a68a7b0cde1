"""Nothing of ours listens where another machine could reach it, whatever executor and communicator
run."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from tests.containers.two_platforms import config_dir

from vllm_di.components.messages import EngineRequest, SamplingParams
from vllm_di.components.transport import GroupStore
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.server.engine_client import ProcessEngineClient

LISTEN = "0A"
TINY = ["model=tiny", "ops=torch", "graph=eager", "model.dtype=float32", "platform=cpu"]
TWO_RANKS = ["executor=multiprocess", "executor.tensor_parallel_size=2"]
SETUPS = {
    "inline": TINY,
    "multiprocess, torch_distributed": [*TINY, *TWO_RANKS, "communicator=torch_distributed"],
    "multiprocess, shared_memory": [*TINY, *TWO_RANKS, "communicator=shared_memory"],
    "pipeline": ["platform=two", "model=tiny", "executor.processes=true", "stages.0.ops=torch"],
}


def addresses(pid: int, *, listening: bool) -> Iterator[tuple[str, int]]:
    """(address, port) of a process's TCP and UDP sockets, by the tables of /proc/net."""
    links = (Path(f"/proc/{pid}/fd") / name for name in os.listdir(f"/proc/{pid}/fd"))
    mine = {os.readlink(link) for link in links if link.is_symlink()}
    for table in ("tcp", "tcp6", "udp", "udp6"):
        try:
            rows = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except FileNotFoundError:
            continue
        for row in rows:
            words = row.split()
            if f"socket:[{words[9]}]" not in mine:
                continue
            if listening and table.startswith("tcp") and words[3] != LISTEN:
                continue
            yield decoded(words[1])


def decoded(word: str) -> tuple[str, int]:
    """``0100007F:1F90`` -> (``127.0.0.1``, 8080): words of 32 bits, low byte first."""
    text, _, port = word.partition(":")
    raw = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    return str(ipaddress.ip_address(raw)), int(port, 16)


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def test_the_tables_are_read_rightly() -> None:
    import socket

    with socket.socket() as one, socket.socket(socket.AF_INET6) as other:
        one.bind(("0.0.0.0", 0))
        one.listen()
        port = one.getsockname()[1]
        assert ("0.0.0.0", port) in addresses(os.getpid(), listening=True)
        other.bind(("::1", 0))
        other.listen()
        assert ("::1", other.getsockname()[1]) in addresses(os.getpid(), listening=True)
    assert not is_loopback("0.0.0.0")
    assert is_loopback("::ffff:127.0.0.1")


async def sockets(assembly: Assembly) -> dict[int, list[tuple[str, int]]]:
    """Process to its sockets, of all processes of a running engine that has answered."""
    client = ProcessEngineClient()
    await client.start(assembly.encode())
    try:
        await client.wait_ready()
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        asked = EngineRequest(request_id="a", prompt_token_ids=[1, 2, 3], params=params)
        async for _ in client.generate(asked):
            pass
        engine = psutil.Process(client.pid)
        running = [engine, *engine.children(recursive=True)]
        return {p.pid: [*addresses(p.pid, listening=True)] for p in running}
    finally:
        await client.close()


@pytest.mark.parametrize("name", SETUPS)
def test_nothing_listens_elsewhere_than_on_the_loopback(name: str, tmp_path: Path) -> None:
    assembly = assemble(SETUPS[name], [config_dir(tmp_path)])
    found = asyncio.run(sockets(assembly))
    assert len(found) == (1 if name == "inline" else 3)
    everything = [pair for pairs in found.values() for pair in pairs]
    assert [pair for pair in everything if not is_loopback(pair[0])] == []
    if "torch_distributed" not in name:
        assert everything == []  # and nothing on it either


def test_the_store_of_a_group_is_the_users_alone() -> None:
    with closing(GroupStore()) as store:
        path = Path(store.address.removeprefix("file://"))
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert path.parent.stat().st_uid == os.getuid()
        path.write_text("")
    assert not path.parent.exists()
