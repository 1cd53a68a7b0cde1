"""A program as strict as the compilers that are hardest to please, which runs on any host.

* Its programs have fixed shapes: one for each plan that was warmed up. It refuses any other.
* Weights are inputs of a program, not part of it: this rank's shares are cut from the checkpoint's
  tensors by the names and shard dimensions that the traced step gives. The model's own are spoilt.
* The cache is one tensor, donated to each step and replaced by what it returns. The old one is
  spoilt, so that whoever still reads it gets NaN.
* Collectives are the marks of the traced step.
* Programs and cache take from the device's memory, which is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tests.components.program.strict.device import StrictDevice
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_di.components.communicator import marks
from vllm_di.components.device.sizes import parse_size
from vllm_di.components.interfaces import (
    AttentionBackend,
    BatchPlan,
    Communicator,
    Device,
    GraphPolicy,
    KvLayout,
    LayerCache,
    Loader,
    Model,
    ModelProgram,
    OpTable,
    WeightPart,
)
from vllm_di.components.kv_groups import Groups
from vllm_di.components.messages import KvGroup, KvSpec
from vllm_di.components.program.traced import check_traceable, share, step_inputs, trace_step
from vllm_di.errors import ConfigError
from vllm_di.models.decoder import Decoder

Signature = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


class StrictProgram(ModelProgram):
    """Compiles with make_fx, at the shapes of each plan."""

    def __init__(
        self,
        device: Device,
        ops: OpTable,
        attention: AttentionBackend,
        kv_layout: KvLayout,
        communicator: Communicator,
        graph: GraphPolicy,
        model: Model,
        loader: Loader,
        *,
        program_memory: str,
    ) -> None:
        check_traceable(ops, graph)
        assert isinstance(device, StrictDevice) and isinstance(model, Decoder)
        if kv_layout.name != "hnd":  # the shape of its one tensor
            raise ConfigError(f"program=strict needs kv_layout=hnd, not {kv_layout.name!r}")
        self._device, self._model, self._layout = device, model, kv_layout
        self._communicator, self._loader = communicator, loader
        self._build = attention.export()
        self._program_memory = parse_size(program_memory, "program_memory")
        self._programs: dict[Signature, GraphModule] = {}
        self._weights: dict[str, Tensor] = {}
        self._groups: Groups
        self.cache: Tensor  # [layers, 2, blocks, kv_heads, block_size, head_size]

    @property
    def num_compiles(self) -> int:
        return len(self._programs)

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        self._groups = layers = Groups(self._model.kv_specs(), groups)

        def caches(num_blocks: int) -> list[LayerCache]:
            return self._layout.allocate(layers.pool, num_blocks, self._model.dtype)

        model, block_size = self._model, self._layout.block_size
        self._step = step = trace_step(
            model, self._build, layers, caches, block_size, self._communicator
        )
        assert len(step.unwritten) == len(layers.places), "attention left the cache to the program"
        whole = self._whole()
        for name, parts in self.parts().items():
            loaded = getattr(step.graph, name)
            shares = [share(whole[part.name], part, self._communicator) for part in parts]
            self._weights[name] = torch.cat(shares).view(loaded.shape).to(loaded.dtype)
            loaded.fill_(float("nan"))
        model.release()

    def parts(self) -> Mapping[str, tuple[WeightPart, ...]]:
        return self._step.weights

    def _whole(self) -> dict[str, Tensor]:
        """The checkpoint's tensors."""
        asked = Whole(self._model)
        self._loader.load(asked)
        return asked.tensors

    def compile(self, plan: BatchPlan) -> None:
        inputs = self._inputs(plan)
        signature = self._signature(inputs)
        if signature in self._programs:
            return
        self._device.take(self._program_memory, "a program")
        sample = torch.zeros(self._shape(2), dtype=self._model.dtype)
        tensors = [*inputs.values(), *self._weights.values(), sample]
        tracer = make_fx(
            self._static_step(list(inputs)), tracing_mode="fake", _allow_non_fake_inputs=True
        )
        self._programs[signature] = tracer(*(tensor.clone() for tensor in tensors))

    def _static_step(self, names: list[str]) -> Any:
        """inputs, weights and cache -> the step's result and the new cache."""
        graph, places = self._step.graph, self._groups.places

        def step(*flat: Tensor) -> tuple[Tensor, Tensor]:
            cache = flat[-1]
            found = dict(zip([*names, *self._weights], flat, strict=False))
            for place in places:
                found[f"key.{place}"], found[f"value.{place}"] = cache[place, 0], cache[place, 1]
            weights = {name: found[name] for name in self._weights}
            out, *new = WithWeights(graph, weights).run(*(found[n] for n in self._step.inputs))
            size = self._layout.block_size
            for layer, place in enumerate(places):
                slots = found[f"slots.{self._groups.of_layer[layer]}"]
                block, offset = slots // size, slots % size
                for half, rows in enumerate(new[2 * layer : 2 * layer + 2]):
                    at = (torch.full_like(block, place), torch.full_like(block, half), block)
                    heads = torch.arange(rows.shape[1])
                    index = (*(x[:, None] for x in at), heads, offset[:, None])
                    cache = cache.index_put(index, rows.to(cache.dtype))
            return out, cache

        return step

    def _inputs(self, plan: BatchPlan) -> dict[str, Tensor]:
        inputs = step_inputs(self._model, self._build, plan)
        used = {name: tensor for name, tensor in inputs.items() if name in self._step.inputs}
        for group in range(plan.num_groups):
            used[f"slots.{group}"] = plan.of_group(group).slot_mapping
        return used

    def _signature(self, inputs: dict[str, Tensor]) -> Signature:
        return tuple((name, tuple(x.shape), x.dtype) for name, x in inputs.items())

    def _shape(self, num_blocks: int) -> tuple[int, ...]:
        spec = self._groups.pool[0]
        size = self._layout.block_size
        return (len(self._groups.pool), 2, num_blocks, spec.num_kv_heads, size, spec.head_size)

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        self.cache = torch.zeros(self._shape(num_blocks), dtype=self._model.dtype)
        self._device.take(self.cache.nbytes, f"a cache of {num_blocks} blocks")

    @property
    def caches(self) -> Sequence[LayerCache]:
        return [LayerCache((self.cache[p, 0], self.cache[p, 1])) for p in self._groups.places]

    @torch.inference_mode()
    def run(self, plan: BatchPlan) -> Tensor:
        inputs = self._inputs(plan)
        program = self._programs.get(self._signature(inputs))
        if program is None:
            raise RuntimeError(f"no program was compiled for {plan.shape}")
        if any(bool((plan.of_group(g).slot_mapping < 0).any()) for g in range(plan.num_groups)):
            raise RuntimeError("padding has slot -1, and this compiler writes to every slot")
        donated = self.cache
        communicating = WithCollectives(program, self._communicator)
        tensors = [*inputs.values(), *self._weights.values(), donated]
        out, cache = communicating.run(*tensors)
        self.replace(cache)
        donated.fill_(float("nan"))
        result: Tensor = out
        return result

    def replace(self, cache: Tensor) -> None:
        self.cache = cache


class WithWeights(Interpreter):
    """The traced step with other tensors in place of its weights."""

    def __init__(self, graph: GraphModule, weights: Mapping[str, Tensor]) -> None:
        super().__init__(graph)
        self._weights = weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._weights.get(target, getattr(self.module, target))


class WithCollectives(Interpreter):
    """A program whose marks are calls of the communicator."""

    def __init__(self, program: GraphModule, communicator: Communicator) -> None:
        super().__init__(program)
        self._communicator = communicator

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.vllm_di.all_reduce.default:
            x, group, world_size = args
            assert (group, world_size) == (marks.GROUP, self._communicator.world_size)
            return self._communicator.all_reduce(x.clone())
        if target is torch.ops.vllm_di.all_gather.default:
            return self._communicator.all_gather(args[0], args[1])
        return super().call_function(target, args, kwargs)


class Whole(Model):
    """Takes a checkpoint as it is."""

    def __init__(self, model: Decoder) -> None:
        self._model, self.tensors = model, {}

    tensors: dict[str, Tensor]

    def load_weights(self, weights: Iterator[tuple[str, Any]]) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in weights}

    def load_random(self, seed: int) -> None:
        self.tensors = dict(self._model.random_weights(seed))

    def kv_specs(self) -> list[KvSpec]:
        raise AssertionError("it is loaded, not run")

    def forward(self, step: Any) -> Tensor:
        raise AssertionError("it is loaded, not run")

    def logits(self, hidden: Tensor) -> Tensor:
        raise AssertionError("it is loaded, not run")
