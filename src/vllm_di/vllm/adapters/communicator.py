"""A Communicator of this project for the tensor-parallel group: all_reduce and all_gather. What its
interface has not (objects, sends between stages) stays with the platform's own communicator, of
which this is a subclass."""

from __future__ import annotations

import functools
import socket
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from torch import Tensor
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

from vllm_di.components.interfaces import Communicator, Placement
from vllm_di.errors import ConfigError
from vllm_di.parts import open_parts
from vllm_di.vllm import versions
from vllm_di.vllm.adapters import traced
from vllm_di.vllm.assembled import current
from vllm_di.vllm.errors import plain
from vllm_di.vllm.extending import base_of


def __getattr__(name: str) -> Any:
    """``vllm/distributed/.../CpuCommunicator``: the adapter on top of that class."""
    return group_communicator(base_of(__name__, name))


@functools.cache
def group_communicator(base: type) -> type:
    """The adapter on top of a platform's communicator."""
    return type(f"GroupCommunicator{base.__name__}", (GroupCommunicator, base), {})


class GroupCommunicator(DeviceCommunicatorBase):
    """The adapter."""

    def __init__(
        self,
        cpu_group: Any,
        device: Any = None,
        device_group: Any = None,
        unique_name: str = "",
        **more: Any,
    ) -> None:
        super().__init__(cpu_group, device, device_group, unique_name, **more)
        self._stack = ExitStack()
        self.inner: Communicator | None = None
        self._ops: Any = None
        """In compiled mode; in eager mode the communicator is called straight."""
        if unique_name.split(":")[0] != "tp":
            return
        port = [_free_port() if self.rank_in_group == 0 else 0]
        dist.broadcast_object_list(port, src=self.ranks[0], group=cpu_group)
        placement = Placement(
            rank=self.rank_in_group,
            world_size=self.world_size,
            rendezvous=f"tcp://127.0.0.1:{port[0]}",
        )
        with plain():
            assembled = current()
            self.calls = assembled.calls
            opened = open_parts(assembled.choices.parts, placement=placement, only=["communicator"])
            self.inner = self._stack.enter_context(opened).communicator
            if self.world_size > 1 and not self.inner:
                raise ConfigError(f"{assembled.choices.where('communicator')}: none was built")
            self._name = f"{assembled.key}.{unique_name}"
            if versions.is_compiled(versions.current_config()):
                self._ops = traced.group_ops()  # defined before it is traced
                self._ops.held[self._name] = self

    def all_reduce(self, input_: Tensor) -> Tensor:
        """The sum over the group."""
        if self.inner is None:
            return super().all_reduce(input_)
        if self._ops is None:
            return self.reduce(input_)
        found: Tensor = self._ops.all_reduce(self._name, input_)
        return found

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """All ranks' tensors, side by side in ``dim``."""
        if self.inner is None:
            return super().all_gather(input_, dim)
        if self._ops is None:
            return self.gather(input_, dim)
        found: Tensor = self._ops.all_gather(self._name, input_, dim, self.world_size)
        return found

    def reduce(self, x: Tensor) -> Tensor:
        """all_reduce, counted; in place."""
        assert self.inner is not None
        self.calls["all_reduce"] += 1
        return self.inner.all_reduce(x)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """all_gather, counted."""
        assert self.inner is not None
        self.calls["all_gather"] += 1
        return self.inner.all_gather(x, dim)

    def destroy(self) -> None:
        self._stack.close()
        super().destroy()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
