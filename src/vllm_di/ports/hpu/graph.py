"""Two ways to have a step compiled, of which a process has one: ``torch.compile`` with Gaudi's
backend, or lazy mode, where ``mark_step`` compiles what was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import Device, GraphPolicy, ModelStep, StepFunction
from vllm_di.errors import ConfigError
from vllm_di.ports.hpu.vendor import is_lazy, mark_step


class HpuCompileGraph(GraphPolicy):
    """One compiled graph for each shape; never a fall-back to uncompiled code."""

    def __init__(
        self, device: Device, *, backend: str, max_graphs: Annotated[int, msgspec.Meta(ge=1)]
    ) -> None:
        if is_lazy(device):
            raise ConfigError(
                "device.lazy=true records each step, and graph=hpu_compile compiles it with "
                f"{backend}: take one, device.lazy=false or graph=hpu_lazy"
            )
        if backend not in torch._dynamo.list_backends(exclude_tags=()):
            raise ConfigError(
                f"backend: torch.compile has no backend {backend!r}; Habana's package registers "
                "hpu_backend"
            )
        self._backend: Any = torch._dynamo.lookup_backend(backend)
        self._max_graphs, self._compiled = max_graphs, 0

    @property
    def num_compiles(self) -> int:
        return self._compiled

    def wrap(self, forward: StepFunction) -> StepFunction:
        def compile_one(graph: Any, inputs: Sequence[Any]) -> Any:
            self._compiled += 1
            return self._backend(graph, inputs)

        compiled = torch.compile(forward, backend=compile_one, dynamic=False, fullgraph=True)

        def run(step: ModelStep) -> Tensor:
            # padded or not, made in inference mode: torch compiles anew for tensors that are not
            step = replace(step, token_ids=step.token_ids.clone(), positions=step.positions.clone())
            with torch._dynamo.config.patch(
                recompile_limit=self._max_graphs,
                accumulated_recompile_limit=self._max_graphs,
                fail_on_recompile_limit_hit=True,
            ):
                out: Tensor = compiled(step)
                return out

        return run


class HpuLazyGraph(GraphPolicy):
    """Marks the end of each step, whose operations were recorded."""

    def __init__(self, device: Device) -> None:
        if not is_lazy(device):
            raise ConfigError(
                "graph=hpu_lazy marks steps that lazy mode records, and device.lazy is false; set "
                "device.lazy=true, or take graph=hpu_compile"
            )
        self._mark_step = mark_step(device)
        self._seen: set[tuple[Any, ...]] = set()

    @property
    def num_compiles(self) -> int:
        """Shapes of steps that came: lazy mode compiles for each of them."""
        return len(self._seen)

    def wrap(self, forward: StepFunction) -> StepFunction:
        def run(step: ModelStep) -> Tensor:
            self._seen.add(_shapes(step))
            out = forward(step)
            self._mark_step()
            return out

        return run


def _shapes(step: ModelStep) -> tuple[Any, ...]:
    tensors = [step.token_ids, step.hidden, *(cache.key for cache in step.caches[:1])]
    for metadata in step.metadata:
        tensors += [getattr(metadata, name) for name in metadata.__dataclass_fields__]
    return tuple(t.shape if isinstance(t, Tensor) else None for t in tensors)
