"""Which ports of this host are open to whom, read from ``/proc`` (Linux)."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

LISTENS = "0A"
"""The state of a socket in ``/proc/net/tcp``."""
PROC = Path("/proc")


class Port(msgspec.Struct, frozen=True):
    """One listening TCP socket."""

    address: str
    port: int
    program: str
    """The process that has it open, its number behind: ``raylet (4711)``."""

    def __str__(self) -> str:
        return f"{self.program} on {self.address}:{self.port}"


def listening(pids: set[int]) -> list[Port]:
    """The ports that some processes listen on."""
    owners = {inode: pid for pid in pids for inode in _sockets(pid)}
    return [
        Port(address, port, f"{_program(owners[inode])} ({owners[inode]})")
        for address, port, inode in _listeners()
        if inode in owners
    ]


def processes_of(mark: str) -> set[int]:
    """Processes whose command line has the mark in it, with those that they have started."""
    parents = dict(_parents())
    found = {pid for pid in parents if mark in _command(pid)}
    grown = -1
    while grown != len(found):
        grown = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


def beyond(ports: list[Port], address: str) -> list[Port]:
    """Those that can be reached at another address than the loopback and ``address``. One on all
    interfaces counts where this host has a further address."""
    others = [a for a in own_addresses() if a != address and not _is_loopback(a)]
    found = []
    for port in ports:
        where = ipaddress.ip_address(port.address)
        if where.is_unspecified:
            if any(where.version == 6 or ":" not in other for other in others):
                found.append(port)
        elif port.address != address and not _is_loopback(port.address):
            found.append(port)
    return found


def own_addresses() -> list[str]:
    """All IP addresses of this host, link-local ones left out."""
    found, last = [], ""
    for line in _lines(PROC / "net/fib_trie"):
        if "|--" in line:
            last = line.split()[-1]
        elif "/32 host LOCAL" in line and last not in found:
            found.append(last)
    for line in _lines(PROC / "net/if_inet6"):
        address = ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))
        if not address.is_link_local:
            found.append(str(address))
    return found


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _listeners() -> Iterator[tuple[str, int, str]]:
    """(address, port, inode)."""
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in _lines(PROC / "net" / name)[1:]:
            fields = line.split()
            if fields[3] != LISTENS:
                continue
            host, _, port = fields[1].partition(":")
            # words of 32 bits, each in the order of this machine's bytes
            words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
            address = ipaddress.ip_address(socket.inet_ntop(family, b"".join(words)))
            mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
            yield str(mapped or address), int(port, 16), fields[9]


def _sockets(pid: int) -> Iterator[str]:
    """Inodes of the sockets that a process has open; none of one that may not be looked at."""
    try:
        names = os.listdir(PROC / str(pid) / "fd")
    except OSError:
        return
    for name in names:
        try:
            target = os.readlink(PROC / str(pid) / "fd" / name)
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]


def _parents() -> Iterator[tuple[int, int]]:
    """(process, its parent)."""
    for folder in PROC.iterdir():
        if folder.name.isdecimal():
            # the name, in brackets, may hold anything
            fields = "".join(_lines(folder / "stat")).rpartition(") ")[2].split()
            if fields:
                yield int(folder.name), int(fields[1])


def _command(pid: int) -> str:
    try:
        raw = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace")


def _program(pid: int) -> str:
    return Path((_command(pid).split() or ["?"])[0]).name


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # without IPv6, say
