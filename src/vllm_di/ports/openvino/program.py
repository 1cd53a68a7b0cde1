"""A step as one model that OpenVINO compiled."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    AttentionBackend,
    BatchPlan,
    CacheTensor,
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
from vllm_di.components.program.compile_cache import compile_key
from vllm_di.components.program.traced import (
    TracedStep,
    check_traceable,
    exported,
    step_inputs,
    trace_step,
)
from vllm_di.components.shapes.padding import without_padding
from vllm_di.errors import ConfigError, PortError
from vllm_di.ports.openvino.convert import convert
from vllm_di.ports.openvino.device import NAMES, load_openvino, openvino_device
from vllm_di.ports.openvino.tensors import to_openvino, to_torch


class OpenVinoProgram(ModelProgram):
    """Traces the model with attention as it exports itself, compiles the whole, and drops the
    model's weights. Batches of any shape go through the one compiled model; padding is cut off. It
    writes to the blocks of the table whatever the slots say: block 0 takes those of a warm-up.

    ``cache_dir``: where compiled models are kept, each under its ``compile_key``; null: nowhere.
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
        self._model, self._layout, self.cache_dir = model, kv_layout, cache_dir
        self._communicator = communicator
        check_traceable(ops, graph)
        if communicator.world_size > 1:
            raise ConfigError(
                f"a compiled step cannot wait for {communicator.world_size} ranks; "
                "take executor.tensor_parallel_size=1"
            )
        self._build = exported(attention, "openvino")
        self._pool: list[LayerCache] = []
        self._num_compiles = 0
        self._groups: Groups

    @property
    def num_compiles(self) -> int:
        return self._num_compiles

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        self._groups = layers = Groups(self._model.kv_specs(), groups)

        def caches(num_blocks: int) -> list[LayerCache]:
            return self._layout.allocate(layers.pool, num_blocks, self._model.dtype)

        step = trace_step(
            self._model, self._build, layers, caches, self._layout.block_size, self._communicator
        )
        folder = self._folder(step)
        converted = convert(step)
        names, self._unwritten = step.inputs, step.unwritten
        # the compiler copies the weights once more: let go of those in the graph, which has cycles
        del step
        self._model.release()
        gc.collect()
        wanted = self._layout.describe(layers.pool[0], self._model.dtype)
        dtype = wanted[0].dtype
        compiled = self._device.compile(converted, self._model.dtype, dtype, folder)
        self._num_compiles += 1  # one program suits every shape
        _check_ports(compiled, names, wanted)
        self._names = {name: i for i, name in enumerate(names)}
        self._request = compiled.create_infer_request()

    def _folder(self, step: TracedStep) -> str | None:
        """Where the compiled model is kept: OpenVINO has the weights in it."""
        if self.cache_dir is None:
            return None
        key = compile_key(
            step,
            target=self._device.target,
            versions={"openvino": load_openvino().__version__},
            with_weights=True,
        )
        return str(Path(self.cache_dir).expanduser() / key)

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        pool = self._groups.pool
        self._pool = self._layout.allocate(pool, num_blocks, self._model.dtype)
        for i, cache in enumerate(self._pool):  # the cache stays where it is
            for name, tensor in zip((f"key.{i}", f"value.{i}"), cache.tensors, strict=True):
                self._request.set_input_tensor(self._names[name], to_openvino(tensor))

    @property
    def caches(self) -> Sequence[LayerCache]:
        return [self._pool[place] for place in self._groups.places]

    @torch.inference_mode()
    def run(self, plan: BatchPlan) -> Tensor:
        plan = without_padding(plan)
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
            self._layout.write(self.caches[layer], k, v, tables.slot_mapping)
        return out[:wanted] if self._model.last else out

    def close(self) -> None:
        self._request = None


def _check_ports(compiled: Any, names: Sequence[str], wanted: Sequence[CacheTensor]) -> None:
    """The compiled model reports the cache's type and shape: they must be the layout's."""
    for name, port in zip(names, compiled.inputs, strict=True):
        for tensor in wanted:
            if name.partition(".")[0] != tensor.name:
                continue
            kind, ours = port.element_type.get_type_name(), list(tensor.shape)
            shape = [d.get_length() if d.is_static else None for d in port.partial_shape][1:]
            same = all(a in (b, None) for a, b in zip(shape, ours, strict=True))
            if kind != NAMES[tensor.dtype] or not same:
                raise PortError(
                    f"the compiled model wants {name} as {kind} {port.partial_shape}, but "
                    f"kv_layout gives {NAMES[tensor.dtype]} [?,{','.join(map(str, ours))}]",
                    key="kv_layout",
                )
