"""A worker's program of platform=neuron, fed batches by hand in its two phases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.ports.openvino.running import BLOCKS_PER_SEQUENCE, SEQUENCES, Share, tokens
from tests.ports.tpu.running import Padded

from vllm_di.components.interfaces import Placement
from vllm_di.components.messages import KvGroup
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.ports.neuron.program import NeuronProgram

SIMULATED = ("platform=neuron", "device.simulated=true")
FEW = ("shapes.decode_seqs=[16]", "shapes.prefill_queries=[256]", "model.max_model_len=256")
PHASES: list[list[Share]] = [
    [(0, tokens(0, 37))],
    [(2, tokens(3, 5))],
    [(0, tokens(1, 1)), (2, tokens(2, 1))],
    [(0, tokens(5, 40))],
    [(2, tokens(7, 1)), (0, tokens(8, 1))],
]
"""Prompts one at a time, a prompt's second piece, decodes side by side."""


@contextmanager
def running(*overrides: str) -> Iterator[Padded]:
    """Loaded, its cache filled with what nobody wrote; compiled as it is fed."""
    assembly = assemble([*SIMULATED, *FEW, *overrides])
    with opened(WorkerContainer, assembly, placement=Placement()) as container:
        groups = [KvGroup([spec.layer for spec in container.worker().load().kv_specs])]
        program = container.program()
        assert isinstance(program, NeuronProgram)
        program.prepare(groups)
        program.allocate(groups, SEQUENCES * BLOCKS_PER_SEQUENCE + 1)
        program.fill(float("nan"))
        yield Padded(container.model(), program, container.shapes())
