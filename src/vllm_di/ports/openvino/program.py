"""A step as one model that OpenVINO compiled."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.graph.eager import EagerGraph
from vllm_di.components.interfaces import (
    AttentionBackend,
    BatchPlan,
    Communicator,
    Device,
    GraphPolicy,
    KvLayout,
    LayerCache,
    Model,
    ModelProgram,
    OpTable,
)
from vllm_di.components.kv_groups import Groups
from vllm_di.components.messages import KvGroup
from vllm_di.components.program.traced import step_inputs, trace_step
from vllm_di.errors import ConfigError, PortError
from vllm_di.ports.openvino.convert import convert
from vllm_di.ports.openvino.device import NAMES, openvino_device
from vllm_di.ports.openvino.tensors import to_openvino, to_torch

OUTSIDE = ("greedy_sample", "top_k_top_p_sample")
"""Ops that the sampler calls, outside the compiled step."""


class OpenVinoProgram(ModelProgram):
    """Traces the model with attention as it exports itself, compiles the whole, and drops the
    model's weights. Batches of any shape go through the one compiled model; padding is cut off.

    ``cache_dir``: where OpenVINO keeps compiled models; null: nowhere.
    """

    def __init__(
        self,
        device: Device,
        ops: OpTable,
        attention: AttentionBackend,
        kv_layout: KvLayout,
        communicator: Communicator,
        graph: GraphPolicy,
        model: Model,
        *,
        cache_dir: str | None,
    ) -> None:
        self._device = openvino_device(device, "program=openvino")
        self._model, self._layout, self._cache_dir = model, kv_layout, cache_dir
        _refuse(ops, communicator, graph)
        try:
            self._build = attention.export()
        except ConfigError as error:
            raise ConfigError(f"{error}; on this platform attention=openvino has, too") from None
        self._dry: list[LayerCache] = []
        self._pool: list[LayerCache] = []
        self._groups: Groups
        self._bound: Sequence[LayerCache] | None = None

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        self._groups = layers = Groups(self._model.kv_specs(), groups)

        def caches(num_blocks: int) -> list[LayerCache]:
            return self._layout.allocate(layers.pool, num_blocks, self._model.dtype)

        step = trace_step(self._model, self._build, self._groups, caches, self._layout.block_size)
        converted = convert(step)
        names, self._unwritten = step.inputs, step.unwritten
        # the compiler copies the weights once more: let go of those in the graph, which has cycles
        del step
        self._model.release()
        gc.collect()
        self._dry = caches(1)
        dtype = self._dry[0].key.dtype
        compiled = self._device.compile(converted, self._model.dtype, dtype, self._cache_dir)
        self._check_ports(compiled, names)
        self._names = {name: i for i, name in enumerate(names)}
        self._request = compiled.create_infer_request()

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        pool = self._groups.pool
        self._pool = self._layout.allocate(pool, num_blocks, self._model.dtype)

    @property
    def caches(self) -> Sequence[LayerCache]:
        return [self._pool[place] for place in self._groups.places]

    @torch.inference_mode()
    def run(self, plan: BatchPlan) -> Tensor:
        plan, pool = _without_padding(plan), self._pool
        if plan.slot_mapping[0] < 0:  # a warm-up, whose tokens go nowhere: here to one spare block
            plan, pool = _to_spare_block(plan), self._dry
        self._bind(pool)
        wanted = len(plan.logits_rows)
        if not wanted:  # the compiled model gives one row at least
            plan = dataclasses.replace(plan, logits_rows=torch.zeros(1, dtype=torch.int64))
        inputs = step_inputs(self._model, self._build, plan)  # their memory is read until the end
        for name, tensor in inputs.items():
            if name in self._names:
                self._request.set_input_tensor(self._names[name], to_openvino(tensor))
        self._request.infer()
        out = to_torch(self._request.get_output_tensor(0))
        for n, layer in enumerate(self._unwritten):
            k, v = (to_torch(self._request.get_output_tensor(1 + 2 * n + i)) for i in (0, 1))
            tables = plan.of_group(self._groups.of_layer[layer])
            self._layout.write(pool[self._groups.places[layer]], k, v, tables.slot_mapping)
        return out[:wanted] if self._model.last else out

    def _bind(self, pool: Sequence[LayerCache]) -> None:
        """Hand the cache to the compiled model, once: it stays where it is."""
        if pool is self._bound:
            return
        for i, cache in enumerate(pool):
            for name, tensor in ((f"key.{i}", cache.key), (f"value.{i}", cache.value)):
                self._request.set_input_tensor(self._names[name], to_openvino(tensor))
        self._bound = pool

    def _check_ports(self, compiled: Any, names: Sequence[str]) -> None:
        """The compiled model reports the cache's type and shape: they must be the layout's."""
        ports = dict(zip(names, compiled.inputs, strict=True))
        for i, cache in enumerate(self._dry):
            for name, tensor in ((f"key.{i}", cache.key), (f"value.{i}", cache.value)):
                port = ports[name]
                kind = port.element_type.get_type_name()
                shape = [d.get_length() if d.is_static else None for d in port.partial_shape]
                ours = list(tensor.shape[1:])
                same = all(a in (b, None) for a, b in zip(shape[1:], ours, strict=True))
                if kind != NAMES[tensor.dtype] or not same:
                    raise PortError(
                        f"the compiled model wants {name} as {kind} {port.partial_shape}, but "
                        f"kv_layout gives {NAMES[tensor.dtype]} [?,{','.join(map(str, ours))}]"
                    )

    def close(self) -> None:
        self._bound, self._request = None, None


def _refuse(ops: OpTable, communicator: Communicator, graph: GraphPolicy) -> None:
    """Raise ConfigError for what a compiled step would have to ignore."""
    opaque = {op: name for op, name in ops.opaque.items() if op not in OUTSIDE}
    if opaque:
        op, name = next(iter(opaque.items()))
        raise ConfigError(
            f"ops.{op}: {name} is no torch code, and the compiled step cannot take it in; choose "
            f"openvino or torch (of another library the sampler's ops alone: {', '.join(OUTSIDE)})"
        )
    if communicator.world_size > 1:
        raise ConfigError(
            f"a compiled step cannot wait for {communicator.world_size} ranks; "
            "take executor.tensor_parallel_size=1"
        )
    if not isinstance(graph, EagerGraph):
        raise ConfigError(
            f"graph: a compiled step has nothing for {type(graph).__name__} to record; "
            "take graph=eager"
        )


def _to_spare_block(plan: BatchPlan) -> BatchPlan:
    return dataclasses.replace(
        plan,
        block_table=torch.zeros_like(plan.block_table),
        more_groups=[
            dataclasses.replace(tables, block_table=torch.zeros_like(tables.block_table))
            for tables in plan.more_groups
        ],
    )


def _without_padding(plan: BatchPlan) -> BatchPlan:
    total = sum(plan.query_lens_host)
    if total == len(plan.token_ids):
        return plan
    return dataclasses.replace(
        plan,
        more_groups=[
            dataclasses.replace(tables, slot_mapping=tables.slot_mapping[:total])
            for tables in plan.more_groups
        ],
        token_ids=plan.token_ids[:total],
        positions=plan.positions[:total],
        slot_mapping=plan.slot_mapping[:total],
        hidden=None if plan.hidden is None else plan.hidden[:total],
    )
