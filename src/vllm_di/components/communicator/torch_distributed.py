"""Collectives by torch.distributed: gloo on hosts, a vendor's backend on its devices."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Annotated

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

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


class TorchDistributedCommunicator(Communicator):
    """torch's default process group, of which a worker process has one. ``interface`` is the
    network interface that ranks talk over."""

    def __init__(
        self,
        placement: Placement,
        device: Device,
        *,
        backend: str,
        timeout: Annotated[float, msgspec.Meta(gt=0)],
        interface: str = "lo",
    ) -> None:
        if not dist.is_backend_available(backend):
            raise ConfigError(f"this torch has no distributed backend {backend!r}")
        self.rank, self.world_size = placement.rank, placement.world_size
        self._opened = False
        if self.world_size > 1:
            if not placement.rendezvous.startswith("file://"):
                log.warning(
                    "communicator=torch_distributed: the ranks meet at %s, a store without a "
                    "secret; give them a file://PATH",
                    placement.rendezvous,
                )
            for variable, form in INTERFACE.items():
                os.environ[variable] = form.format(interface)
            dist.init_process_group(
                backend,
                init_method=placement.rendezvous,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=timeout),
            )
            self._opened = True

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
