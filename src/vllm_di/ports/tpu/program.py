"""A step as one program of XLA, whose KV cache is donated to it and comes back."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from importlib import util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from vllm_di.components.program.compile_cache import compile_key
from vllm_di.components.program.traced import (
    TracedStep,
    check_traceable,
    exported,
    step_inputs,
    trace_step,
)
from vllm_di.errors import ConfigError
from vllm_di.ports.tpu.attention import TpuAttention, mark
from vllm_di.ports.tpu.chips import Chips
from vllm_di.ports.tpu.device import XlaDevice
from vllm_di.ports.tpu.kept import KeptSteps, kept_programs, sources_hash

log = logging.getLogger(__name__)


class TpuProgram(ModelProgram):
    """Traces the model with attention as it exports itself, lowers torch ops to jnp, and compiles
    the whole once for each shape. Weights are inputs of the program, apart from it; the cache is
    donated, so that the new one is written where the old one lay.

    XLA knows the number of blocks when it compiles: all is compiled in the warm-up, not before the
    cache is sized. ``cache_dir``: where steps are kept, as JAX exports them, with what XLA made of
    them; null: nowhere.
    """

    option = "tpu"
    """Of its device and attention, for errors."""

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
        if not isinstance(device, XlaDevice):
            raise ConfigError(
                f"program={self.option} needs device={self.option}, not {type(device).__name__}"
            )
        self._device = device
        self._jax = self._device.jax
        self._mesh = Chips(self._jax, self._device.chips, kv_layout)
        self._model, self._layout, self.cache_dir = model, kv_layout, cache_dir
        self._communicator, self._attention = communicator, attention
        check_traceable(ops, graph)
        if (ranks := communicator.world_size) > 1:
            raise ConfigError(
                f"executor.tensor_parallel_size {ranks}: one process drives all chips; take "
                f"executor.tensor_parallel_size=1 device.chips={ranks}"
            )
        self._build = exported(attention, self.option)
        self._groups: Groups
        self.arrays: list[Any] = []
        """The cache: the tensors of each place of the pool, in order."""
        self._compiled: dict[Any, Any] = {}
        self._kept: KeptSteps | None = None

    @property
    def compiled(self) -> Sequence[Any]:
        """What XLA made, one for each function and shape."""
        return list(self._compiled.values())

    @property
    def num_compiles(self) -> int:
        return len(self._compiled)

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        from vllm_di.ports.tpu.arrays import to_numpy
        from vllm_di.ports.tpu.ragged import load_kernel

        if self._device.backend == "tpu" and isinstance(self._attention, TpuAttention):
            load_kernel()
        self._groups = layers = Groups(self._model.kv_specs(), groups)

        def caches(num_blocks: int) -> list[LayerCache]:
            return self._layout.allocate(layers.pool, num_blocks, self._model.dtype)

        step = trace_step(
            self._model, self._build, layers, caches, self._layout.block_size, self._communicator
        )
        self._mesh.check(self._model.kv_specs())
        self.constants = {
            name: self._mesh.constant(to_numpy(getattr(step.graph, name)), name in step.weights)
            for name in {n.target for n in step.graph.graph.nodes if n.op == "get_attr"}
        }
        for name in self.constants:  # its nodes live on in what is lowered
            delattr(step.graph, name)
        self._kept = self._kept_steps(step)
        self._step, self._head = self.lower(step)
        self._model.release()
        gc.collect()

    def _kept_steps(self, step: TracedStep) -> KeptSteps | None:
        if self.cache_dir is None:
            return None
        if util.find_spec("flatbuffers") is None or len(self._device.chips) > 1:
            log.warning(
                "program.cache_dir: compiled programs are kept; steps are not, and each start "
                "lowers them again: to keep them takes one chip, and the Python package flatbuffers"
            )
            return None
        key = compile_key(
            step,
            target=self._device.backend,
            versions={
                "jax": self._jax.__version__,
                "jaxlib": version("jaxlib"),
                "lowering": sources_hash(),
            },
            with_weights=False,
        )
        return KeptSteps(
            self._jax,
            self.cache_dir,
            key,
            backend=self._device.backend,
            num_chips=len(self._device.chips),
            write=self.write,
        )

    def write(self, entry: Path, exported: Any, lowered: Any) -> None:
        """Put more into a new entry of ``cache_dir`` than what JAX reads back."""

    def lower(self, step: TracedStep) -> tuple[Any, Any]:
        """-> two functions to compile: the step to hidden states, which has a shape for each number
        of tokens, and from these to logits, which has one for each number of rows too."""
        from vllm_di.ports.tpu.lowering import check_lowerings, lower
        from vllm_di.ports.tpu.ragged import by_kernel, in_jnp, written

        graph, unwritten, layers, jax = step.graph, step.unwritten, self._groups, self._jax
        op = mark._opoverload
        check_lowerings(graph, op)
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        by_name = dict(zip(step.inputs, places, strict=True))
        outputs: Any = graph.graph.output_node().args[0]
        caches = [n for name, n in by_name.items() if name.startswith(("key.", "value."))]
        rows = by_name.pop("rows", None)
        self._names = [name for name, node in by_name.items() if node not in caches]
        inputs = [by_name[name] for name in self._names]
        attend = self._mesh.by_heads(by_kernel if self._device.backend == "tpu" else in_jnp)
        mesh, width = self._mesh, len(caches) // max(1, len(layers.pool))
        heads_first = self._layout.name == "hnd"
        sizes = [spec.head_size for spec in layers.pool for _ in range(width)]
        hidden = outputs[0] if rows is None else next(iter(rows.users)).args[0]
        body = lower(graph, op, attend, [*inputs, *caches], [hidden, *outputs[1:]])

        def whole(constants: Any, arrays: Any, values: Any, slots: Any) -> Any:
            with jax.default_matmul_precision("highest"):  # a TPU would round fp32 to bf16
                # a mark knows that heads are rounded up, torch ops do not
                seen = [a[..., :n] for a, n in zip(arrays, sizes, strict=True)]
                given = seen if unwritten else arrays
                (out, *new), found = body(constants, [*values, *given])
            arrays = list(arrays) if unwritten else [found[node] for node in caches]
            slots = [_after(out, place) for place in slots] if unwritten else slots
            for n, layer in enumerate(unwritten):  # attention left it to the program
                k, v, place = *new[2 * n : 2 * n + 2], slots[layers.of_layer[layer]]
                at = width * layers.places[layer]
                if width == 1:
                    arrays[at] = written(arrays[at], k, v, place)
                    continue
                for i, rows in enumerate((k, v)):
                    arrays[at + i] = _written(arrays[at + i], rows, place, heads_first)
            return mesh.whole(out), [mesh.cut(array) for array in arrays]

        if rows is None:
            return jax.jit(whole, donate_argnums=1), None
        last = lower(graph, op, attend, [hidden, rows], outputs[:1])

        def head(constants: Any, hidden: Any, rows: Any) -> Any:
            with jax.default_matmul_precision("highest"):
                return last(constants, [hidden, rows])[0][0]

        return jax.jit(whole, donate_argnums=1), jax.jit(head)

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        from vllm_di.ports.tpu.arrays import DTYPES

        jnp = self._jax.numpy
        described = [self._layout.describe(spec, self._model.dtype) for spec in self._groups.pool]
        self.arrays = [
            jnp.zeros(
                tensor.whole_shape(num_blocks), DTYPES[tensor.dtype], device=self._mesh.caches
            )
            for tensors in described
            for tensor in tensors
        ]
        self._per_layer = len(described[0]) if described else 0

    def fill(self, value: float) -> None:
        """Set the whole cache to ``value``."""
        self.arrays = [array * 0 + value for array in self.arrays]

    @property
    def caches(self) -> Sequence[LayerCache]:
        """Copies on the host: what is written to them is lost."""
        from vllm_di.ports.tpu.arrays import to_torch

        count, specs = self._per_layer, self._groups.pool
        pool = [
            LayerCache(
                tuple(to_torch(a)[..., : spec.head_size] for a in self.arrays[i : i + count])
            )
            for spec, i in zip(specs, range(0, len(self.arrays), count), strict=True)
        ]
        return [pool[place] for place in self._groups.places]

    @torch.inference_mode()
    def run(self, plan: BatchPlan) -> Tensor:
        from vllm_di.ports.tpu.arrays import to_torch

        rows, *given = self._given(plan)
        args = (self.constants, self.arrays, *given)
        out, self.arrays = self._ready(self._step, *args)(*args)
        if not self._model.last:
            return to_torch(out)
        if not len(plan.logits_rows):
            return torch.zeros(0, self._model.vocab_size, dtype=torch.float32)
        args = (self.constants, out, rows)
        return to_torch(self._ready(self._head, *args)(*args))

    @torch.inference_mode()
    def warm_up(self, plan: BatchPlan) -> Tensor:
        """On the host a program is ready once it is compiled; a chip loads it when it first
        runs."""
        if self._device.backend != "cpu":
            return self.run(plan)
        rows, *given = self._given(plan)
        step = self._ready(self._step, self.constants, self.arrays, *given)
        out = step.out_info[0]
        if not self._model.last:
            return torch.zeros(out.shape, dtype=self._model.dtype)
        if len(plan.logits_rows):
            hidden = self._jax.ShapeDtypeStruct(
                out.shape, out.dtype, sharding=step.output_shardings[0]
            )
            self._ready(self._head, self.constants, hidden, rows)
        return torch.zeros(len(plan.logits_rows), self._model.vocab_size, dtype=torch.float32)

    def _given(self, plan: BatchPlan) -> tuple[Any, list[Any], list[Any]]:
        """-> the rows whose logits are wanted, the step's inputs, the slots of each KvGroup."""
        from vllm_di.ports.tpu.arrays import to_numpy

        given = {
            name: to_numpy(x) for name, x in step_inputs(self._model, self._build, plan).items()
        }
        slots = [to_numpy(plan.of_group(g).slot_mapping) for g in range(plan.num_groups)]
        return given.get("rows"), [given[name] for name in self._names], slots

    def _ready(self, function: Any, *args: Any) -> Any:
        """``function`` as compiled for the shapes of ``args``."""
        key = (function, *(x.shape for x in self._jax.tree.leaves(args[1:])))
        if key not in self._compiled:
            self._compiled[key] = self.compile_for(function, args)
        return self._compiled[key]

    def compile_for(self, function: Any, args: Sequence[Any]) -> Any:
        """The jitted ``function``, a part of the step, compiled for the shapes of ``args``."""
        return self.compiled_of(self.lowered_for(function, args))

    def lowered_for(self, function: Any, args: Sequence[Any]) -> Any:
        if self._kept is None:
            return function.lower(*args)
        is_step = function is self._step
        return self._kept.lowered(function, "step" if is_step else "head", [1] * is_step, args)

    def compiled_of(self, lowered: Any) -> Any:
        """What XLA makes of it."""
        with kept_programs(self._jax, self.cache_dir):
            return lowered.compile(compiler_options=self._device.compiler_options)

    def close(self) -> None:
        for function, *_ in self._compiled:  # JAX itself would keep what it traced
            function.clear_cache()
        if self._compiled and self._kept is not None:
            self._jax.clear_caches()  # of what was exported it keeps more than its functions' own
        self._compiled.clear()
        self.arrays.clear()


def _after(out: Any, slots: Any) -> Any:
    """``slots``, so that XLA takes them to follow from ``out``, for which the old cache was read:
    else it copies the whole cache, twice in a step, lest it be written before it is read."""
    x = out[0, 0]
    return slots + ((x != x) & (x == 0)).astype(slots.dtype)  # never true, and not folded


def _written(cached: Any, new: Any, slots: Any, heads_first: bool) -> Any:
    """``new`` [tokens, kv_heads, head_size] in its slots of ``cached`` [blocks, kv_heads,
    block_size, head_size] or [blocks, block_size, kv_heads, head_size]; those below 0 are
    dropped."""
    blocks, size = cached.shape[0], cached.shape[2 if heads_first else 1]
    slots = slots + (slots < 0) * (blocks * size + 1)  # beyond the last: -1 would be the last
    at = (slots // size, slots % size)
    places = (at[0], slice(None), at[1]) if heads_first else at
    return cached.at[places].set(new.astype(cached.dtype), mode="drop")
