"""Collectives as nodes of a traced step: torch ops that stand for them. A compiler knows them as
its own; a program without such a compiler calls the communicator where it meets one."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = "tensor_parallel"
"""The group of all ranks of a stage; further ones will have names of their own."""


@torch.library.custom_op("vllm_di::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group: str, world_size: int) -> Tensor:
    """The sum of x over the ranks of ``group``. -> as x."""
    raise RuntimeError("this op stands for a collective of a compiled step")


@all_reduce.register_fake
def _(x: Tensor, group: str, world_size: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("vllm_di::all_gather", mutates_args=())
def all_gather(x: Tensor, dim: int, group: str, world_size: int) -> Tensor:
    """The ranks' tensors one after the other along ``dim``, in rank order."""
    raise RuntimeError("this op stands for a collective of a compiled step")


@all_gather.register_fake
def _(x: Tensor, dim: int, group: str, world_size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] *= world_size
    return x.new_empty(shape)
