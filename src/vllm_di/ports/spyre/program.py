"""A step through ``torch.compile``, by the vendor's compiler or another one that torch knows."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

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
from vllm_di.components.program.sources import sources_dropped
from vllm_di.components.program.traced import (
    TracedStep,
    check_traceable,
    exported,
    step_inputs,
    trace_step,
)
from vllm_di.errors import ConfigError, PortError
from vllm_di.ports.spyre.device import spyre_device
from vllm_di.ports.spyre.kv_layout import SpyreLayout

FALL_BACK = "FallbackWarning"
"""Name of the warning that torch-spyre gives where an op runs on the host in place of the card."""


class SpyreProgram(ModelProgram):
    """Traces the model, and has ``backend`` compile the whole once for each padded shape, without
    free sizes. The ops that store give a new cache, which takes the old one's place.

    The number of blocks is one of the sizes, so that all is compiled in the warm-up, not before the
    cache is sized. An op that falls back to the host, and a graph that breaks, are errors.
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
        backend: str,
    ) -> None:
        self._backend = Backend(spyre_device(device, "program=spyre").compiler(backend))
        check_traceable(ops, graph)
        if communicator.world_size > 1:
            raise ConfigError(
                f"executor.tensor_parallel_size {communicator.world_size}: program=spyre has no "
                "collectives in its step; set it to 1"
            )
        if not isinstance(kv_layout, SpyreLayout):
            raise ConfigError(
                f"program=spyre writes the cache by Spyre's op, not to the KV layout "
                f"{kv_layout.name!r}; take kv_layout=spyre"
            )
        self._model, self._layout, self._communicator = model, kv_layout, communicator
        self._build = exported(attention, "spyre")
        self._groups: Groups
        self._step: TracedStep
        self._pool: list[LayerCache] = []
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._modules: list[GraphModule] = []

    @property
    def num_compiles(self) -> int:
        return self._backend.num_compiles

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        self._groups = layers = Groups(self._model.kv_specs(), groups)

        def caches(num_blocks: int) -> list[LayerCache]:
            return self._layout.allocate(layers.pool, num_blocks, self._model.dtype)

        self._step = step = trace_step(
            self._model, self._build, layers, caches, self._layout.block_size, self._communicator
        )
        with sources_dropped():
            _return_caches(step, layers)
        self._model.release()

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        self._pool = self._layout.allocate(self._groups.pool, num_blocks, self._model.dtype)

    @property
    def caches(self) -> Sequence[LayerCache]:
        return [self._pool[place] for place in self._groups.places]

    def run(self, plan: BatchPlan) -> Tensor:
        """Raises ValueError for a plan that no ShapePolicy padded to a static shape."""
        if plan.padded_to is None:
            raise ValueError(f"{plan.shape} has no static shape; take shapes=spyre")
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # the compiler takes no inference tensors
            return self._run(plan)

    def _run(self, plan: BatchPlan) -> Tensor:
        given = step_inputs(self._model, self._build, plan)
        for group in range(plan.num_groups):
            given[f"slots.{group}"] = plan.of_group(group).slot_mapping[None].clamp(min=0)
        given = {n: given[n].clone() for n in self._step.inputs if n in given}
        for place, cache in enumerate(self._pool):
            given[f"key.{place}"], given[f"value.{place}"] = cache.tensors
        arguments = [given[name] for name in self._step.inputs]
        key = tuple(tuple(x.shape) for x in arguments)
        if (program := self._programs.get(key)) is None:
            with sources_dropped(), _no_fall_back():
                program = self._compiled()
                out, *new = program(*arguments)  # torch compiles in the first call
            self._programs[key] = program
        else:
            out, *new = program(*arguments)
        self._pool = [LayerCache((k, v)) for k, v in zip(new[::2], new[1::2], strict=True)]
        result: Tensor = out
        return result

    def _compiled(self) -> Callable[..., Any]:
        """A program of its own: torch counts the shapes of one, and gives up beyond a limit."""
        source, graph = self._step.graph, Graph()
        outputs = graph.graph_copy(source.graph, {})
        graph.output(outputs)
        self._modules.append(GraphModule(source, graph))
        found: Callable[..., Any] = torch.compile(
            self._modules[-1],
            backend=self._backend,
            fullgraph=True,
            dynamic=False,
            # the shapes choose the program, and torch would keep each guard for good
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )
        return found

    def close(self) -> None:
        for module in self._modules:
            torch._dynamo.eval_frame.remove_from_cache(module)
        self._modules.clear()
        self._programs.clear()
        self._pool.clear()


class Backend:
    """Counts what it compiles. torch keeps it for the life of the process, and so it holds nothing
    of a program."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self._compile: Any = backend
        if isinstance(backend, str):
            self._compile = torch._dynamo.lookup_backend(backend)
        self.num_compiles = 0

    def __call__(self, graph: GraphModule, examples: Sequence[Any]) -> Any:
        compiled = self._compile(graph, examples)
        self.num_compiles += 1
        return compiled


@contextmanager
def _no_fall_back() -> Any:
    """Raises PortError at the end of a block in which an op fell back to the host."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for one in caught:
        if one.category.__name__ == FALL_BACK:
            raise PortError(
                f"an op of the step would run on the host, not on the card: {one.message}; "
                "choose another op or attention, or another platform"
            )


def _return_caches(step: TracedStep, groups: Groups) -> None:
    """Have the graph give back the cache of each place of the pool, keys and values, behind its
    first output. Each store works on what the one before it gave; what attention left to the
    program is stored at the end, at the slots of an input ``slots.GROUP`` [1, tokens] int64."""
    graph, store = step.graph.graph, torch.ops.spyre.paged_attn_store.default
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    now = dict(zip(step.inputs, inputs, strict=True))
    end: Node = graph.output_node()
    outputs: list[Node] = list(end.args[0])  # type: ignore[arg-type]
    first, rows = outputs[0], outputs[1:]
    places = {now[f"key.{place}"]: place for place in range(len(groups.pool))}
    for node in [n for n in graph.nodes if n.target is store]:
        place = places[node.args[2]]
        node.args = (*node.args[:2], now[f"key.{place}"], now[f"value.{place}"], node.args[4])
        _keep(graph, node, node.next, place, now)
    for n, layer in enumerate(step.unwritten):
        name = f"slots.{groups.of_layer[layer]}"
        if name not in now:
            with graph.inserting_after(inputs[-1]):
                now[name] = graph.placeholder(name.replace(".", "_"))
            inputs.append(now[name])
            step.inputs.append(name)
        place = groups.places[layer]
        with graph.inserting_before(end):
            new = [
                graph.call_function(torch.ops.aten.unsqueeze.default, (x, 0))
                for x in rows[2 * n : 2 * n + 2]
            ]
            old = (now[f"key.{place}"], now[f"value.{place}"])
            node = graph.call_function(store, (*new, *old, now[name]))
        _keep(graph, node, end, place, now)
    pool = range(len(groups.pool))
    end.args = ([first, *(now[f"{part}.{p}"] for p in pool for part in ("key", "value"))],)
    step.graph.recompile()


def _keep(graph: Graph, store: Node, before: Node, place: int, now: dict[str, Node]) -> None:
    with graph.inserting_before(before):
        now[f"key.{place}"] = graph.call_function(operator.getitem, (store, 0))
        now[f"value.{place}"] = graph.call_function(operator.getitem, (store, 1))
