"""Collectives by torch.distributed: gloo on hosts, a vendor's backend on its devices."""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import socket
import struct
from datetime import timedelta
from typing import Annotated, Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from vllm_di.components.communicator.engine_store import EngineStore
from vllm_di.components.interfaces import Communicator, Device, Placement
from vllm_di.errors import ConfigError

log = logging.getLogger(__name__)

INTERFACE = {
    "GLOO_SOCKET_IFNAME": "{}",
    "NCCL_SOCKET_IFNAME": "={}",
    "HCCL_SOCKET_IFNAME": "={}",
}
"""How each library is told which network interface to listen on: it has no other switch that torch
passes on, and would take the first that is not the loopback. ``=`` stands for the exact name."""
LOOPBACK = "lo"
GET_ADDRESS = 0x8915
"""SIOCGIFADDR of Linux: the IPv4 address of a network interface."""


class TorchDistributedCommunicator(Communicator):
    """torch's default process group, of which a worker process has one. ``interface`` is the
    network interface that ranks talk over; None: the loopback, or between hosts the one that leads
    to the engine's."""

    def __init__(
        self,
        placement: Placement,
        device: Device,
        *,
        backend: str,
        timeout: Annotated[float, msgspec.Meta(gt=0)],
        interface: str | None = None,
    ) -> None:
        if not dist.is_backend_available(backend):
            raise ConfigError(f"this torch has no distributed backend {backend!r}")
        self.rank, self.world_size = placement.rank, placement.world_size
        self._store: EngineStore | None = None
        self._opened = False
        if self.world_size > 1:
            for variable, form in INTERFACE.items():
                os.environ[variable] = form.format(_interface(placement, interface))
            dist.init_process_group(
                backend,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=timeout),
                **self._meeting(placement, timeout),
            )
            self._opened = True

    def _meeting(self, placement: Placement, timeout: float) -> dict[str, Any]:
        """By which the ranks find each other."""
        if placement.node is not None and placement.node.store is not None:
            self._store = EngineStore(placement.node.store, timeout)
            return {"store": self._store}
        if not placement.rendezvous.startswith("file://"):
            log.warning(
                "communicator=torch_distributed: the ranks meet at %s, a store without a "
                "secret; give them a file://PATH",
                placement.rendezvous,
            )
        return {"init_method": placement.rendezvous}

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.world_size > 1:
            x = x.contiguous()
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        if self.world_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    def close(self) -> None:
        if self._opened:
            self._opened = False
            dist.destroy_process_group()
        if self._store is not None:
            self._store.close()
            self._store = None


def _interface(placement: Placement, named: str | None) -> str:
    """Of this host. Raises ConfigError for the loopback where a rank is on another host."""
    node = placement.node
    is_alone = node is None or ipaddress.ip_address(node.address).is_loopback
    if named == LOOPBACK and not is_alone:
        raise ConfigError(
            f"interface: {named} does not lead to the other nodes that ranks are on; name the "
            "network's, or take null"
        )
    if named is not None:
        return named
    return LOOPBACK if node is None or is_alone else _of_address(node.address)


def _of_address(address: str) -> str:
    """The network interface that has an IPv4 address. Raises ConfigError."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                raw = fcntl.ioctl(sock, GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none
            found.append(f"{name} ({socket.inet_ntoa(raw[20:24])})")
            if socket.inet_ntoa(raw[20:24]) == address:
                return name
    raise ConfigError(
        f"interface: none of this host's has the IPv4 address {address}; name one: "
        f"{', '.join(found)}"
    )
