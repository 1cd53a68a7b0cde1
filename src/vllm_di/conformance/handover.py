"""The two sides of a hand-over of the KV cache: the platform under test and the reference, or the
two roles of a platform that has them. Their caches alone, value by value, and an engine of both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import lcm
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vllm_di.components.executor.side_blocks import Held, SideBlocks
from vllm_di.components.interfaces import (
    DEFAULT_ROLE,
    Communicator,
    Engine,
    KvLayout,
    ModelProgram,
    ModelRunner,
    Placement,
)
from vllm_di.components.messages import KvGroup
from vllm_di.conformance.outcomes import NotDeclared
from vllm_di.conformance.probes import name_of
from vllm_di.conformance.subject import (
    BLOCKS,
    OF_WORKER,
    REFERENCE,
    Subject,
    on_model,
    one_layer,
)
from vllm_di.conformance.tiny import CONTEXT, hf_config
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.containers.fill import Launcher, opened
from vllm_di.containers.overrides import read
from vllm_di.containers.slots import EngineContainer, WorkerContainer
from vllm_di.errors import ConfigError

Way = Literal["gives", "takes"]
"""Whether the platform under test gives its cache away, running prompts, or takes another's."""
ROLES = ("prefill", "decode")
UNLIKE = ("kv_layout=nhd", "kv_layout.block_size=16")
"""Of the reference: other blocks than most platforms have, with the heads inside."""
LAYERS = 2
NUM_HELD = 8
"""Blocks of the scheduler that a hand-over of values may name, from 1 on: 0 may be for padding."""
SHAPE = hf_config("gqa", 32)
HEADS: int = SHAPE["num_key_value_heads"]
ONE_GROUP = (KvGroup([0, 1]),)
TWO_GROUPS = (KvGroup([0]), KvGroup([1]))
TRANSFER = "vllm_di.components.kv_transfer.shared_memory.SharedMemoryTransfer"


class Side(NamedTuple):
    """One of the two."""

    name: str
    stages: list[list[str]]
    """Overrides of each of its workers."""
    tensor_parallel: Sequence[int]
    """World sizes that its platform declares."""


def sides(subject: Subject) -> tuple[Side, Side]:
    """The platform under test and the reference; of one with roles, that of prompts and that of
    tokens. Raises NotDeclared for other roles."""
    if tuple(subject.roles) == (DEFAULT_ROLE,):
        [own] = subject.roles.values()
        if not any(read(text).key == "platform" for text in own[0]):  # chosen by itself
            own = [[f"platform={subject.platform}", *own[0]]]
        plain = [text for text in REFERENCE if read(text).slot in OF_WORKER]
        there = Side("the reference", [[*plain, *UNLIKE]], ())
        return Side(subject.platform, own, subject.declared.tensor_parallel), there
    if tuple(subject.roles) != ROLES:
        raise NotDeclared(f"its roles are {', '.join(subject.roles)}, not {' and '.join(ROLES)}")
    whole = subject.assembly()
    prefill, decode = (
        Side(
            role,
            subject.roles[role],
            whole.of_role(role).platform_of(0).capabilities.tensor_parallel,
        )
        for role in ROLES
    )
    return prefill, decode


def in_order(subject: Subject, way: Way) -> tuple[Side, Side]:
    """-> (the side that gives, the side that takes)."""
    here, there = sides(subject)
    return (here, there) if way == "gives" else (there, here)


# -- caches alone ------------------------------------------------------------------------------


class Alone(Communicator):
    """One rank without its peers: its collectives have the right shapes and no more. Nothing that
    the model computes is looked at."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat([x] * self.world_size, dim)


class Rank(NamedTuple):
    """One worker, and what its cache is reached by."""

    worker: Any
    runner: ModelRunner
    layout: KvLayout
    program: ModelProgram


class Caches:
    """All ranks of one side, with their weights loaded."""

    def __init__(self, ranks: list[Rank], groups: Sequence[KvGroup]) -> None:
        self.ranks, self.groups, self._num_blocks = ranks, groups, 0
        self.block_size = ranks[0].layout.block_size
        self.dtype: torch.dtype
        """Of what is gathered."""
        self.is_float: bool
        """Whether the cache holds floats."""

    def allocate(self, block_size: int) -> None:
        """For a scheduler whose blocks have that many tokens. No warm-up: nothing runs. Raises
        NotDeclared for a platform that hands nothing over."""
        self._num_blocks = (NUM_HELD + 1) * block_size // self.block_size
        for rank in self.ranks:
            rank.runner.allocate(self.groups, self._num_blocks)
            try:
                rank.worker.kv_open(b"s" * 32, dict.fromkeys(range(LAYERS), HEADS))
            except ConfigError as error:
                raise NotDeclared(str(error)) from error
        self.dtype = self.values(0)[0].dtype
        tensors = self.ranks[0].program.caches[0].tensors
        self.is_float = all(tensor.is_floating_point() for tensor in tensors)

    def values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots on the host, [slots, heads of all ranks, head size]."""
        halves: tuple[list[Tensor], list[Tensor]] = ([], [])
        for rank in self.ranks:
            cache = rank.program.caches[layer]
            device = cache.tensors[0].device
            table = torch.arange(self._num_blocks, dtype=torch.int64, device=device)
            found = rank.layout.gather(cache, table, self._num_blocks * rank.layout.block_size)
            for half, tensor in zip(halves, found, strict=True):
                half.append(tensor.cpu().clone())
        return torch.cat(halves[0], 1), torch.cat(halves[1], 1)

    def fill(self, seed: int, head_size: int) -> None:
        """Random keys and values in every slot of every layer."""
        generator = torch.Generator().manual_seed(seed)
        slots = len(self.values(0)[0])
        for layer in range(LAYERS):
            whole = [
                torch.randn(slots, HEADS, head_size, dtype=torch.float32, generator=generator)
                for _ in "kv"
            ]
            for index, rank in enumerate(self.ranks):
                own = HEADS // len(self.ranks)
                cache = rank.program.caches[layer]
                device = cache.tensors[0].device
                k, v = (x[:, index * own : (index + 1) * own].to(device) for x in whole)
                places = torch.arange(slots, dtype=torch.int64, device=device)
                with torch.inference_mode():
                    rank.layout.write(cache, k, v, places)


@contextmanager
def caches(
    subject: Subject,
    side: Side,
    *more: str,
    groups: Sequence[KvGroup] = ONE_GROUP,
    world_size: int = 1,
    stage: int = 0,
) -> Iterator[Caches]:
    """The ranks of one of a side's stages, with both layers of a tiny model."""
    assembly = _assembly_of_worker(subject, side, *more, stage=stage)
    with ExitStack() as stack:
        ranks = []
        for index in range(world_size):
            alone: dict[str, Any] = {"communicator": Alone(index, world_size)}
            objects = alone if world_size > 1 else {}
            container = stack.enter_context(
                opened(WorkerContainer, assembly, placement=Placement(index, world_size), **objects)
            )
            worker, runner = container.worker(), container.model_runner()
            worker.load()
            worker.prepare(list(groups))
            ranks.append(Rank(worker, runner, container.kv_layout(), container.program()))
        yield Caches(ranks, groups)


def _assembly_of_worker(subject: Subject, side: Side, *more: str, stage: int = 0) -> Assembly:
    own = [text for text in side.stages[stage] if read(text).key != "model.layers"]
    own = ["worker=handover", "kv_transfer=shared_memory", *own, *_around(subject)]
    return assemble([*own, *on_model(subject.model_folder()), *more], subject.config_dirs)


def _around(subject: Subject) -> list[str]:
    """What the subject's overrides choose beside workers and their executor."""
    apart = (*OF_WORKER, *subject.roles, "stages", "executor", "kv_transfer")
    return [text for text in subject.overrides if read(text).slot not in apart]


def common_block(one: Caches, other: Caches) -> int:
    """Tokens in a block of the scheduler: whole blocks of both sides."""
    return lcm(one.block_size, other.block_size)


def assert_crosses(sender: Caches, receiver: Caches, seed: int, head_size: int) -> None:
    """Hand random values of whole and partial blocks over: the receiver has the sender's values in
    its own dtype, rounded once, at these places, and what it had before everywhere else. Raises
    AssertionError."""
    size = common_block(sender, receiver)
    sender.fill(seed, head_size)
    receiver.fill(seed + 1, head_size)
    before = [receiver.values(layer) for layer in range(LAYERS)]
    given = [sender.values(layer) for layer in range(LAYERS)]
    sent = _held(size, len(sender.groups))
    taken = [one._replace(block=NUM_HELD + 1 - one.block) for one in sent]
    spans = SideBlocks(size, sender.block_size, CONTEXT).spans(sent)
    parcels = [rank.worker.kv_offer(spans, []) for rank in sender.ranks]
    spans = SideBlocks(size, receiver.block_size, CONTEXT).spans(taken)
    for rank in receiver.ranks:
        why = rank.worker.kv_take(spans, parcels)
        assert not why, f"the hand-over failed: {why}"
    for layer in range(LAYERS):
        _assert_layer(layer, receiver, sent, taken, size, given, before)


def _held(size: int, num_groups: int) -> list[Held]:
    """For each group a block that is full, and some that are not; no block twice."""
    blocks = iter((5, 2, 7, 1, 6, 3, 8, 4))
    lengths = (size, 1, size - 1, size // 2 + 1)
    return [
        Held(group, next(blocks), length, 0) for group in range(num_groups) for length in lengths
    ]


def _assert_layer(
    layer: int,
    receiver: Caches,
    sent: Sequence[Held],
    taken: Sequence[Held],
    size: int,
    given: Sequence[tuple[Tensor, Tensor]],
    before: Sequence[tuple[Tensor, Tensor]],
) -> None:
    group = next(g for g in receiver.groups if layer in g.layers)
    place = group.layers.index(layer)  # layers of other groups use the same tensors
    for half, name in enumerate(("keys", "values")):
        wanted, addressed = before[layer][half].clone(), torch.zeros(len(before[layer][half]))
        for one, other in zip(sent, taken, strict=True):
            source = given[receiver.groups[one.group].layers[place]][half]
            start, end = other.block * size, other.block * size + other.tokens
            crossed = source[one.block * size : one.block * size + one.tokens]
            wanted[start:end] = crossed.to(receiver.dtype)
            addressed[start:end] = 1
            found = receiver.values(layer)[half][start:end]
            assert torch.equal(found, wanted[start:end]), (
                f"layer {layer}, group {one.group}: {name} of {one.tokens} tokens in blocks of "
                f"{size} are not those that were given, in {receiver.dtype}"
            )
        rest = addressed == 0
        found = receiver.values(layer)[half]
        assert torch.equal(found[rest], wanted[rest]), (
            f"layer {layer}: a hand-over changed {name} of other tokens"
        )


# -- an engine of both -------------------------------------------------------------------------


@contextmanager
def both(subject: Subject, way: Way, *more: str, model: str = "gqa") -> Iterator[Engine]:
    """A started engine whose prompts run on the side that gives, and whose tokens come from the
    one that takes. ``probes.CALLS["kv_transfer"]`` counts what moves its cache."""
    giving, taking = in_order(subject, way)
    folder = Path(subject.model_folder(model))
    conf, option = folder.parent / "conf", f"handover_{way}"
    _write_platform(conf / "platform" / f"{option}.yaml", option, giving, taking)
    of_roles = [
        f"{role}.worker.num_blocks={8 * BLOCKS}"  # of the reference, whose blocks are small
        for role, side in zip(ROLES, (giving, taking), strict=True)
        if side.name == "the reference"
    ]
    assembly = assemble(
        [
            f"platform={option}",
            *_around(subject),
            *on_model(folder),
            *of_roles,
            f"kv_transfer._target_={name_of('Counting', TRANSFER)}",
            *more,
        ],
        [*subject.config_dirs, conf],
    )
    with opened(EngineContainer, assembly, launcher=Launcher(assembly)) as container:
        yield container.engine()


def _write_platform(path: Path, option: str, giving: Side, taking: Side) -> None:
    """What a user would write to split a model over both."""
    lines = ["# @package _global_", "defaults:", "  - override /executor: disaggregated"]
    lines.append("workers:")
    for role, side in zip(ROLES, (giving, taking), strict=True):
        lines.append(f"  {role}:")
        count = len(side.stages)
        for index, overrides in enumerate(side.stages):
            stage = ["worker=handover", *(o for o in overrides if read(o).key != "model.layers")]
            stage += [one_layer(index, count)] if count > 1 else []
            lines.append(f"    - {json.dumps(stage)}")
    lines += ["platform:", f"  name: {option}", "  level: declared", "  detect: {}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, ""]))
