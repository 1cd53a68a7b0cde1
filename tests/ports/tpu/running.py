"""A worker's program of platform=tpu, fed batches by hand, as the shape policy pads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.ports.openvino import running as by_hand
from tests.ports.openvino.running import BLOCKS_PER_SEQUENCE, SEQUENCES, STEPS
from torch import Tensor

from vllm_di.components.interfaces import Model, Placement, ShapePolicy
from vllm_di.components.messages import KvGroup
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.ports.tpu.program import TpuProgram

ONE_SHAPE = ("scheduler.max_num_batched_tokens=128", "shapes.sizes=[128]")
"""One program is compiled for all of STEPS."""


class Padded(by_hand.Padded):
    """With the program's own type."""

    def __init__(self, model: Model, program: TpuProgram, shapes: ShapePolicy) -> None:
        super().__init__(model, program, shapes)
        self.tpu = program


@contextmanager
def running(*overrides: str) -> Iterator[Padded]:
    """Loaded and compiled, its cache filled with what nobody wrote."""
    here = [] if "device=host" in overrides else ["device.backend=cpu"]
    assembly = assemble(["platform=tpu", *here, *ONE_SHAPE, *overrides])
    with opened(WorkerContainer, assembly, placement=Placement()) as container:
        groups = [KvGroup([spec.layer for spec in container.worker().load().kv_specs])]
        program = container.program()
        assert isinstance(program, TpuProgram)
        program.prepare(groups)
        program.allocate(groups, SEQUENCES * BLOCKS_PER_SEQUENCE + 1)
        program.fill(float("nan"))
        yield Padded(container.model(), program, container.shapes())


def logits(*overrides: str) -> list[Tensor]:
    """Of every token of STEPS."""
    with running(*overrides) as one:
        return [one.feed(step) for step in STEPS]
