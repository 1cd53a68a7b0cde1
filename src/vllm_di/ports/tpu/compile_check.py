"""The whole step compiled for TPUs that are not here, by libtpu's description of their chips."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata, util
from typing import Any

import torch
from msgspec.structs import replace

from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.compile_check import CompileCheck, Compiled
from vllm_di.components.graph.eager import EagerGraph
from vllm_di.components.interfaces import BatchPlan, Placement
from vllm_di.components.messages import KvGroup
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.traced import TracedOps
from vllm_di.components.program.traced import step_inputs
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.components.shapes.sizes import Sizes
from vllm_di.components.shapes.token_buckets import TokenBuckets
from vllm_di.errors import ConfigError, PortError
from vllm_di.models.config import DecoderConfig
from vllm_di.models.decoder import Decoder
from vllm_di.ports.tpu.attention import TpuAttention
from vllm_di.ports.tpu.chips import Chips
from vllm_di.ports.tpu.device import TpuDevice, XlaDevice, load_jax
from vllm_di.ports.tpu.kv_layout import TpuLayout
from vllm_di.ports.tpu.program import TpuProgram

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Target:
    """A chip as libtpu names it, and what it has."""

    topology: str
    accelerator: str
    version: int
    """Of the TPU, which the vendor's kernel asks for."""
    memory: int
    """Bytes of HBM of one device of JAX: cloud.google.com/tpu/docs/v5e, /v6e and /tpu7x; a chip of
    v7x is two devices."""


TARGETS = {
    "v5e": Target("v5e:2x2", "v5litepod-4", 5, 16 * GIB),
    "v6e": Target("v6e:2x2", "v6e-4", 6, 32 * GIB),
    "v7x": Target("tpu7x:2x2x1", "tpu7x-8", 7, 96 * GIB),
}
CODE_SHARE = 100
"""A program may take a hundredth of the memory: the programs of all buckets lie there at once."""
CACHE = 1 * GIB
"""Of a layer: small beside every chip's memory, and more than any step needs beside it."""

LAYERS = 2
"""Of each model: a layer is compiled as often as it stands there, and all are alike."""
LLAMA = DecoderConfig(
    architecture="LlamaForCausalLM",
    num_hidden_layers=LAYERS,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    hidden_act="silu",
)
MODELS = {
    "smollm2": replace(  # the options model=smollm2 and model=llama3 but for their layers
        LLAMA,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
        rope_theta=100000.0,
    ),
    "llama3 8B": replace(
        LLAMA,
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        rope_theta=500000.0,
    ),
}
KERNEL_CALL = 'custom_call_target="tpu_custom_call"'
"""A kernel of the vendor's in XLA's program."""
PHASES = ("decode", "prefill")
COMPILED = {
    "program": TpuProgram,
    "attention": TpuAttention,
    "kv_layout": TpuLayout,
    "quantization": NoQuantization,
    "graph": EagerGraph,
    "shapes": TokenBuckets,
}
"""The choices that are compiled, by slot."""


class TpuCompile(CompileCheck):
    """Two layers of each model in bfloat16, in the buckets of a decode and of the largest prefill:
    the step to hidden states, and the way from these to logits. Weights and cache are shapes alone,
    and nothing is run.

    Attention is tpu-inference's kernel, which a TPU would run: the form in jnp stands for it on the
    host alone.
    """

    def __init__(self, worker: Mapping[str, Any]) -> None:
        ops = worker["ops"]
        chosen = {slot: worker[slot] for slot in COMPILED} | {"ops.library": ops["library"]}
        for slot, kind in {**COMPILED, "ops.library": TracedOps}.items():
            if (found := chosen[slot].get("_target_")) != f"{kind.__module__}.{kind.__qualname__}":
                raise ConfigError(
                    f"platform.compile compiles {kind.__name__}, and {slot} is {found}; leave it "
                    "as the platform has it"
                )
        for op, name in ops.items():
            if op not in ("_target_", "library") and name != "auto":
                raise ConfigError(f"platform.compile compiles ops=traced; leave ops.{op} out")
        shapes = worker["shapes"]
        self._seqs, self._block_size = shapes["max_num_seqs"], worker["kv_layout"]["block_size"]
        most, remedy = shapes["max_num_batched_tokens"], "lower scheduler.max_num_batched_tokens"
        sizes = Sizes("shapes.sizes", shapes["sizes"], most, remedy)
        self._tokens = {"decode": sizes.over(min(self._seqs, most)), "prefill": sizes.over(most)}
        if util.find_spec("libtpu") is None:
            raise PortError(
                "libtpu compiles for TPUs and is not installed; pip install 'jax[tpu]==0.10.2'"
            )
        self._jax = load_jax("tpu")

    @classmethod
    def targets(cls) -> Sequence[str]:
        return list(TARGETS)

    @classmethod
    def parts(cls) -> Sequence[str]:
        return [f"{model} {phase}" for model in MODELS for phase in PHASES]

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        return {
            name: metadata.version(name)
            for name in ("jax", "libtpu", "tpu-inference")
            if util.find_spec(name.replace("-", "_"))
        }

    def compile(self, part: str, target: str) -> Sequence[Compiled]:
        from vllm_di.ports.tpu.ragged import load_kernel

        name, phase = part.rsplit(" ", 1)
        kernel, chip = load_kernel(), TARGETS[target]
        with _described(self._jax, chip) as device, _asked(kernel, chip.version):
            layout = TpuLayout(device, block_size=self._block_size)
            attention = TpuAttention(device, layout)
            ops, one = SelectedOps(TracedOps(compiler="XLA")), SingleCommunicator(Placement())
            quantization = NoQuantization(ops)
            model = Decoder(device, ops, attention, one, quantization, config=MODELS[name])
            model.finalize()  # weights that nobody reads: no page of them is touched
            program = ShapesAlone(device, ops, attention, layout, one, EagerGraph(), model)
            try:
                program.prepare([KvGroup([spec.layer for spec in model.kv_specs()])])
                blocks = CACHE // layout.bytes_per_block(model.kv_specs()[:1], model.dtype)
                plan = self._plan(self._tokens[phase], model.max_model_len)
                with self._jax.sharding.use_abstract_mesh(program.mesh):
                    made = program.compile_shapes(plan, blocks)
            finally:
                program.close()
                self._jax.clear_caches()  # the kernel's trace is another one for another chip
        found = [_figures(step, compiled, caches, chip) for step, compiled, caches in made]
        if not found[0].figures["kernels"]:
            raise RuntimeError(f"{part} for {target}: XLA's program calls no kernel of the vendor")
        return found

    def _plan(self, tokens: int, longest: int) -> BatchPlan:
        """Of that many tokens, as TokenBuckets pads it for contexts up to ``longest``."""
        seqs, columns = self._seqs, -(-longest // self._block_size)
        return BatchPlan(
            token_ids=torch.zeros(tokens, dtype=torch.int64),
            positions=torch.zeros(tokens, dtype=torch.int64),
            query_start=torch.zeros(seqs + 1, dtype=torch.int32),
            seq_lens=torch.zeros(seqs, dtype=torch.int32),
            block_table=torch.zeros(seqs, columns, dtype=torch.int32),
            slot_mapping=torch.zeros(tokens, dtype=torch.int64),
            logits_rows=torch.zeros(seqs, dtype=torch.int64),
            query_lens_host=[0] * seqs,
            seq_lens_host=[0] * seqs,
        )


class ShapesAlone(TpuProgram):
    """A program that is compiled and never run: its weights and its cache are shapes."""

    def __init__(self, device: XlaDevice, *parts: Any) -> None:
        super().__init__(device, *parts, cache_dir=None)
        self._mesh = ChipsAlone(self._jax, device.chips, self._layout)

    @property
    def mesh(self) -> Any:
        """Of the chips, as JAX wants it for a kernel that asks what it is compiled for."""
        return self._mesh.mesh.abstract_mesh

    def compile_shapes(
        self, plan: BatchPlan, num_blocks: int
    ) -> list[tuple[str, Any, Sequence[int]]]:
        """-> name, what XLA made, and the bytes of each cache that was donated to it."""
        from vllm_di.ports.tpu.arrays import DTYPES, to_numpy

        jax, layout, model = self._jax, self._layout, self._model
        caches = [
            jax.ShapeDtypeStruct(
                tensor.whole_shape(num_blocks), DTYPES[tensor.dtype], sharding=self._mesh.caches
            )
            for spec in self._groups.pool
            for tensor in layout.describe(spec, model.dtype)
        ]
        given = {
            name: self._mesh.constant(to_numpy(tensor), False)
            for name, tensor in step_inputs(model, self._build, plan).items()
        }
        inputs = [given[name] for name in self._names]
        slots = [self._mesh.constant(to_numpy(plan.slot_mapping), False)]
        step = self._step.lower(self.constants, caches, inputs, slots)
        hidden = jax.ShapeDtypeStruct(
            (len(plan.token_ids), model.hidden_size),
            DTYPES[model.dtype],
            sharding=given["rows"].sharding,
        )
        head = self._head.lower(self.constants, hidden, given["rows"])
        sizes = [cache.size * cache.dtype.itemsize for cache in caches]
        return [
            (f"step of {len(plan.token_ids)} tokens", self.compiled_of(step), sizes),
            (f"logits of {len(plan.logits_rows)} rows", self.compiled_of(head), []),
        ]


class ChipsAlone(Chips):
    """Chips that hold nothing."""

    def constant(self, array: Any, is_weight: bool) -> Any:
        return self._jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=self.place(array, is_weight)
        )


class DescribedDevice(TpuDevice):
    """Chips of a topology; there are none of them to open."""

    def __init__(self, jax: Any, chips: Sequence[Any]) -> None:
        XlaDevice.__init__(
            self,
            None,
            jax=jax,
            backend="tpu",
            chips=chips,
            threads=None,
            memory_budget=None,
            default_dtype="bfloat16",
        )


@contextmanager
def _described(jax: Any, target: Target) -> Iterator[DescribedDevice]:
    """One of the target's chips. libtpu reads what it is to be from the environment alone."""
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": target.accelerator,
    }
    before = {name: os.environ.get(name) for name in wanted}
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for a chip that is here
    os.environ.update(wanted)
    try:
        topologies = import_module("jax.experimental.topologies")
        found = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
        device = DescribedDevice(jax, found.devices[:1])
        try:
            yield device
        finally:
            device.close()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _asked(kernel: Any, version: int) -> Iterator[None]:
    """In the block the vendor's kernel takes the chip for ``version``: it asks JAX's first device,
    and that is the host."""
    asked = kernel.get_tpu_version
    kernel.get_tpu_version = lambda: version
    try:
        yield
    finally:
        kernel.get_tpu_version = asked


def _figures(name: str, compiled: Any, caches: Sequence[int], chip: Target) -> Compiled:
    """Raises RuntimeError where XLA tells nothing of the memory."""
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError(f"{name}: XLA tells nothing of what it takes")
    text = compiled.as_text()
    figures = {
        "code_bytes": memory.generated_code_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "kernels": text.count(KERNEL_CALL),
    }
    bars = {"code_bytes": chip.memory // CODE_SHARE, "peak_bytes": chip.memory}
    if caches:
        figures["aliased_bytes"] = memory.alias_size_in_bytes
        figures["copied_caches"] = len(caches) - text.count("-alias)")
        figures["copied_bytes"] = max(0, sum(caches) - memory.alias_size_in_bytes)
        bars |= {"copied_caches": 0, "copied_bytes": 0, "temp_bytes": min(caches)}
    advice = "lower scheduler.max_num_batched_tokens, the largest bucket; a cache is never copied"
    return Compiled(name, figures, bars, advice)
