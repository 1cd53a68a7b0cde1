"""Bytes by NIXL over UCX: by RDMA where the machines have it, else by shared memory or TCP.

Memory is registered with UCX and read from outside; its owner's thread does nothing for a taker.
What a taker must know to read it, the address and UCX's key, is part of the ticket, which crosses
the engine's own channels.
"""

from __future__ import annotations

import base64
import ctypes
import logging
import mmap
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import util
from typing import Annotated, Any

import msgspec

from vllm_di.components.interfaces import KvTransfer
from vllm_di.errors import ConfigError, EngineDeadError, PortError

LOOPBACK = "lo"
UCX_DEVICES = "UCX_NET_DEVICES"
"""UCX reads it from the environment alone; the backend's own parameter did not keep it from others
(NIXL 1.5.1)."""
WAKE_MICROSECONDS = 1000
"""Between two looks of NIXL's thread at what peers ask of this worker."""
PAUSE = 0.0002
"""Seconds between two looks at a transfer that is under way."""

log = logging.getLogger(__name__)


class NixlTransfer(KvTransfer):
    """Host memory alone: the caches of devices are copied out before, as for every other way.
    Memory is registered once and kept for later offers until ``close``. Raises ConfigError for a
    list of devices that is empty."""

    def __init__(
        self, *, devices: list[str], timeout: Annotated[float, msgspec.Meta(gt=0)]
    ) -> None:
        if not devices:
            raise ConfigError(f"devices: name one network device at least, such as {LOOPBACK}")
        self._devices, self._timeout = devices, timeout
        self._agent: Any = None
        self._offers: dict[str, _Region] = {}
        self._idle: list[_Region] = []
        self._unfinished: list[_Region] = []
        """Of transfers that failed: what is under way may still be written to them."""
        self._known: set[bytes] = set()
        """Descriptions of others' memory that the agent has."""

    def check(self) -> None:
        if util.find_spec("nixl") is None:
            raise ConfigError(
                "kv_transfer=nixl needs the package nixl: pip install 'vllm-di[nixl]'; or take "
                "kv_transfer=shared_memory or kv_transfer=tcp"
            )
        if self._devices != [LOOPBACK]:
            log.warning(
                "kv_transfer=nixl listens on %s: UCX neither encrypts nor asks who connects; "
                "this network must be the engine's own",
                ", ".join(self._devices),
            )

    def check_hosts(self, addresses: Sequence[str]) -> None:
        if len({*addresses}) > 1 and self._devices == [LOOPBACK]:
            raise ConfigError(
                f"kv_transfer.devices=[{LOOPBACK}]: the workers are on "
                f"{', '.join(sorted({*addresses}))}, and reach each other by another network "
                "device; name it, or take kv_transfer=tcp"
            )

    def open(self, session: bytes) -> None:
        """Raises ConfigError where NIXL or its UCX backend cannot be loaded."""
        self.check()
        try:
            self._agent = _agent(self._devices)
        except Exception as error:  # its errors have no class in common
            raise ConfigError(
                f"kv_transfer=nixl cannot start: {type(error).__name__}: {error}"
            ) from error

    def offer(self, size: int) -> tuple[str, memoryview]:
        region = self._region(size)
        ticket = f"{region.address} {size} {self._agent.name} {region.described}"
        self._offers[ticket] = region
        return ticket, memoryview(region.memory)[:size]

    @contextmanager
    def take(self, ticket: str) -> Iterator[memoryview]:
        address, size, name, described = _read(ticket)
        if self._agent is None:
            raise EngineDeadError("this end is closed")
        region = self._region(size)
        try:
            if described not in self._known:
                self._agent.add_remote_agent(described)
                self._known.add(described)
            self._copy(region, size, address, name)
        except Exception as error:
            self._unfinished.append(region)
            why = f"{type(error).__name__}: {error}"
            raise EngineDeadError(f"the cache that worker {name} offered: {why}") from None
        try:
            yield memoryview(region.memory)[:size]
        finally:
            self._idle.append(region)

    def withdraw(self, ticket: str) -> None:
        if (region := self._offers.pop(ticket, None)) is not None:
            self._idle.append(region)

    def close(self) -> None:
        self._agent = None  # first: its thread reads and writes the memory below
        self._offers.clear()
        self._idle.clear()
        self._unfinished.clear()

    # -- inside -------------------------------------------------------------------------------

    def _region(self, size: int) -> _Region:
        fitting = [region for region in self._idle if len(region.memory) >= size]
        if not fitting:
            return _Region(self._agent, size)
        region = min(fitting, key=lambda r: len(r.memory))
        self._idle.remove(region)
        return region

    def _copy(self, region: _Region, size: int, address: int, name: str) -> None:
        """Read ``size`` bytes of another worker. Raises TimeoutError, and what NIXL raises."""
        agent = self._agent
        own = agent.get_xfer_descs([(region.address, size, 0)], "DRAM")
        theirs = agent.get_xfer_descs([(address, size, 0)], "DRAM")
        handle = agent.initialize_xfer("READ", own, theirs, name)
        state, deadline = agent.transfer(handle), time.monotonic() + self._timeout
        while state == "PROC":
            if time.monotonic() > deadline:
                raise TimeoutError(f"not read within {self._timeout:g} s")
            time.sleep(PAUSE)
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise ConnectionError(f"NIXL ended the transfer with {state}")


def _agent(devices: list[str]) -> Any:
    """An agent of NIXL with its UCX backend."""
    from nixl import _bindings, nixl_agent, nixl_agent_config

    name = secrets.token_hex(16)
    agent = nixl_agent(name, nixl_agent_config(backends=[]))
    settings = _bindings.nixlAgentConfig()
    settings.useProgThread, settings.useListenThread = True, False
    settings.pthrDelay = WAKE_MICROSECONDS
    settings.syncMode = _bindings.NIXL_THREAD_SYNC_STRICT
    agent.agent = _bindings.nixlAgent(name, settings)  # the first one's thread would never sleep
    before = os.environ.get(UCX_DEVICES)
    os.environ[UCX_DEVICES] = ",".join(devices)  # UCX opens ports on all devices without it
    try:
        agent.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
    finally:
        if before is None:
            del os.environ[UCX_DEVICES]
        else:
            os.environ[UCX_DEVICES] = before
    return agent


class _Region:
    """Memory that UCX knows."""

    def __init__(self, agent: Any, size: int) -> None:
        self.memory = mmap.mmap(-1, max(mmap.PAGESIZE, 1 << (size - 1).bit_length()))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        descs = agent.register_memory([(self.address, len(self.memory), 0, "")], "DRAM")
        described = agent.get_partial_agent_metadata(descs, inc_conn_info=True)
        self.described = base64.b85encode(described).decode()


def _read(ticket: str) -> tuple[int, int, str, bytes]:
    parts = ticket.split(" ")
    if len(parts) == 4 and all(part.isdecimal() for part in parts[:2]):
        with suppress(ValueError):
            return int(parts[0]), int(parts[1]), parts[2], base64.b85decode(parts[3])
    raise PortError(f"{ticket!r} is no ticket of kv_transfer=nixl")
