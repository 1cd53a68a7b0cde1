"""A stand-in of Habana's package for the simulated device, with the restrictions that its vendor
names. It says nothing of the real kernels' speed or rounding."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from vllm_di.components.device.simulated import HostSimulation
from vllm_di.components.products import matmul
from vllm_di.components.vendor_operators import need
from vllm_di.errors import ConfigError
from vllm_di.kernels.simulated.module import SimulatedModule

PACKAGE = "habana_frameworks"


class HpuSimulation(HostSimulation):
    """Gaudi with its package. ``graph_memory``: bytes that a graph of ``hpu_backend`` takes."""

    def __init__(
        self,
        *,
        memory: str | int,
        devices: Annotated[int, msgspec.Meta(ge=1, le=64)],
        communication: str,
        graph_memory: Annotated[int, msgspec.Meta(ge=0)],
        fault: Literal["out_of_memory", "hang", "nan", "death"] | None,
        fault_after: Annotated[int, msgspec.Meta(ge=0)],
    ) -> None:
        super().__init__(
            memory=memory,
            devices=devices,
            communication=communication,
            fault=fault,
            fault_after=fault_after,
        )
        self._graph_memory = graph_memory

    def define_kernels(self, module: SimulatedModule) -> None:
        found = sys.modules.get(PACKAGE)
        if not isinstance(found, StandIn) and importlib.util.find_spec(PACKAGE) is not None:
            raise ConfigError(
                f"simulated: {PACKAGE} is installed, and a process has one; leave device.simulated "
                "out"
            )
        StandIn(module, self._graph_memory).register()


class StandIn(ModuleType):
    """``habana_frameworks``."""

    def __init__(self, device: SimulatedModule, graph_memory: int) -> None:
        super().__init__(PACKAGE)
        self.lazy = os.environ.get("PT_HPU_LAZY_MODE") == "1"
        self.steps = 0
        self.graphs: list[Any] = []
        self._device, self._graph_memory = device.device, graph_memory
        self.FusedSDPA = type("FusedSDPA", (), {"apply": staticmethod(fused_sdpa)})

    def register(self) -> None:
        sys.modules[PACKAGE] = self
        modules: dict[str, dict[str, Any]] = {
            "torch": {},
            "torch.core": {"mark_step": self._mark_step},
            "torch.hpex": {},
            "torch.hpex.kernels": {"FusedSDPA": self.FusedSDPA},
            "torch.utils": {},
            "torch.utils.internal": {"is_lazy": lambda: self.lazy},
        }
        for path, names in modules.items():
            module = ModuleType(f"{PACKAGE}.{path}")
            for name, value in names.items():
                setattr(module, name, value)
            sys.modules[module.__name__] = module
        torch._dynamo.reset()  # another device's graphs
        if "hpu_backend" not in torch._dynamo.list_backends(exclude_tags=()):
            torch._dynamo.register_backend(_hpu_backend, name="hpu_backend")

    def _mark_step(self) -> None:
        need(self.lazy, "mark_step() outside lazy mode")
        self.steps += 1

    def compile(self, graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        need(not self.lazy, "hpu_backend in lazy mode")
        for value in inputs:
            need(not isinstance(value, torch.SymInt), "a shape is not static")
        recipe = torch.empty(self._graph_memory, dtype=torch.uint8, device=self._device)
        self.graphs.append(recipe)
        forward: Callable[..., Any] = graph.forward
        return forward


def _hpu_backend(graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
    """torch keeps a backend for the life of the process: the stand-in of the last device."""
    stand_in = sys.modules[PACKAGE]
    assert isinstance(stand_in, StandIn)
    return stand_in.compile(graph, inputs)


def fused_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
    softmax_mode: str,
    recompute: bool,
    valid_seq_lengths: Tensor | None,
    padding_side: str,
) -> Tensor:
    """What a padding query gets is NaN: nobody may use it."""
    (batch, heads, queries, size), length = query.shape, key.shape[2]
    need(query.dim() == key.dim() == value.dim() == 4, "operands must have 4 dimensions")
    need(query.dtype == key.dtype == value.dtype, "operands must be of one dtype")
    need(key.shape == value.shape and key.shape[0] == batch, "key and value must be alike")
    need(key.shape[3] == size and heads % key.shape[1] == 0, "heads")
    need(softmax_mode in ("fast", "fp32") and dropout == 0.0, f"softmax mode {softmax_mode}")
    need(not (is_causal and mask is not None), "causal together with a mask")
    need(mask is not None or valid_seq_lengths is not None, "neither mask nor lengths")
    need(not is_causal or queries == length, "causal with other lengths of queries and keys")
    need(padding_side == "right", f"padding side {padding_side}")
    if mask is not None:
        need(mask.dtype == query.dtype and valid_seq_lengths is None, "mask")
        need(tuple(mask.shape) == (batch, 1, queries, length), f"mask of {tuple(mask.shape)}")
    shared = heads // key.shape[1]
    keys, values = (x.repeat_interleave(shared, 1).float() for x in (key, value))
    scores = matmul(query.float(), keys.mT) * scale
    step = torch.arange(length, dtype=torch.int64, device=query.device)
    if mask is None:
        assert valid_seq_lengths is not None
        need(valid_seq_lengths.dtype is torch.int32, "lengths must be int32")
        valid = step < valid_seq_lengths[:, None]  # [batch, length]
        need(tuple(valid_seq_lengths.shape) == (batch,), "a length for each of the batch")
        seen = (step <= step[:, None]) & valid[:, None]
        scores = torch.where(seen[:, None], scores, float("-inf"))
        out = matmul(scores.softmax(-1), values)
        out = torch.where(valid[:, None, :, None], out, float("nan"))
    else:
        out = matmul((scores + mask.float()).softmax(-1), values)
    return out.to(query.dtype)
