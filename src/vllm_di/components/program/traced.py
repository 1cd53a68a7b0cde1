"""A model's whole step as one graph of torch ops, for programs that hand it to a compiler.

``make_fx`` rather than ``torch.export``: the graph is the same, and it takes a fifth of the time
(SmolLM2's 30 layers: 3 s, not 14).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_di.components.graph.eager import EagerGraph
from vllm_di.components.interfaces import (
    AttentionBackend,
    BatchPlan,
    Communicator,
    GraphPolicy,
    GroupTables,
    LayerCache,
    Model,
    ModelStep,
    OpTable,
    TracedCache,
    WeightPart,
)
from vllm_di.components.kv_groups import Groups
from vllm_di.components.ops.traced import SAMPLER_OPS
from vllm_di.components.program.sources import sources_dropped
from vllm_di.errors import ConfigError

CACHED = ("key", "value")
"""Names of the tensors of a layer's cache, as inputs of a traced step."""

Build = Callable[[BatchPlan], Any]
"""What ``AttentionBackend.export`` returned."""


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A step as a graph. Outputs: logits or hidden states, then the keys and the values of each
    layer in ``unwritten``."""

    graph: GraphModule
    inputs: list[str]
    """Names of the inputs in use, in order: ``token_ids``, ..., ``metadata.0.FIELD`` of each
    KvGroup, then ``key.0``, ``value.0``, ... of each place of the pool; of a layout with one tensor
    a layer ``key.0``, ``key.1``, ... A stage that is not the first has ``hidden`` and no
    ``token_ids``."""
    unwritten: list[int]
    """Layers whose new keys and values the program has to write to the cache after the step."""
    weights: dict[str, tuple[WeightPart, ...]]
    """Attributes of ``graph`` that hold weights, to what of the checkpoint they are: so that a
    compiler can shard them, or take them as inputs and keep them apart from its program. Other
    constants are in attributes that are not named here."""


def check_traceable(ops: OpTable, graph: GraphPolicy) -> None:
    """Raise ConfigError for what a traced step would have to ignore."""
    opaque = [(op, name) for op, name in ops.refuses("compile").items() if op not in SAMPLER_OPS]
    if opaque:
        op, name = opaque[0]
        raise ConfigError(
            f"ops.{op}: {name} is no torch code, and the compiled step cannot take it in; choose "
            f"traced or torch (another library's are the sampler's alone: {', '.join(SAMPLER_OPS)})"
        )
    if not isinstance(graph, EagerGraph):
        raise ConfigError(
            f"graph: a compiled step has nothing for {type(graph).__name__} to record; "
            "take graph=eager"
        )


def exported(attention: AttentionBackend, option: str) -> Build:
    """``attention.export()``. Raises ConfigError; ``option`` is the platform's own attention, which
    has one."""
    try:
        build: Build = attention.export()
    except ConfigError as error:
        raise ConfigError(f"{error}; on this platform attention={option} has, too") from None
    return build


def step_inputs(model: Model, build: Build, plan: BatchPlan) -> dict[str, Tensor]:
    """What a step takes beside the cache, by name."""
    # a compiled model has no input that nothing reads: a later stage has no use for the tokens
    first = {"token_ids": plan.token_ids} if plan.hidden is None else {"hidden": plan.hidden}
    found = {**first, "positions": plan.positions}
    if model.last:
        found["rows"] = plan.logits_rows
    for group in range(plan.num_groups):
        metadata = build(plan.of_group(group))
        for field in dataclasses.fields(metadata):
            found[f"metadata.{group}.{field.name}"] = getattr(metadata, field.name)
    return found


@sources_dropped()
@torch.no_grad()
def trace_step(
    model: Model,
    build: Build,
    groups: Groups,
    caches: Callable[[int], Sequence[LayerCache]],
    block_size: int,
    communicator: Communicator,
) -> TracedStep:
    """``caches`` allocates the pool of a small cache of so many blocks. All sizes that a batch has
    stay free. Collectives are marks, which the program has to lower.

    Raises ConfigError for a model, op or attention that cannot be traced.
    """
    if not model.causal:
        raise ConfigError(
            f"{type(model).__name__} is an encoder, which this compiled step cannot run: it has no "
            "cache; take program=eager where the platform has it, such as platform=cpu",
            key="program",
        )
    taken: set[int] = set()
    for _ in range(2):  # once to learn the sizes that metadata fixes, then without them
        sizes = _free_sizes(caches(1), model, taken)
        wanted, seqs, longest, *columns = itertools.islice(sizes, 3 + groups.count)
        plan = _example(model, block_size, wanted, seqs, longest, columns)
        metadata = build(plan)
        taken = {getattr(metadata, f.name).shape[d] for f, dims in _fixed(metadata) for d in dims}
    given = step_inputs(model, build, plan)
    kind, count = type(metadata), len(given)
    fixed = {
        f"metadata.{g}.{f.name}": dims for f, dims in _fixed(metadata) for g in range(groups.count)
    }
    pool = caches(next(sizes))
    names, tensors = list(given), list(given.values())
    for i, layer in enumerate(pool):
        names += [f"{part}.{i}" for part in CACHED[: len(layer.tensors)]]
        tensors += layer.tensors
    width = len(pool[0].tensors) if pool else 0
    unwritten: list[int] = []

    def step(*flat: Tensor) -> list[Tensor]:
        found = dict(zip(names, flat, strict=True))
        caches = [
            TracedCache(tuple(found[f"{part}.{place}"] for part in CACHED[:width]))
            for place in groups.places
        ]
        hidden = found.get("hidden")
        out = model.forward(
            ModelStep(
                # a later stage has no use for the tokens: what stands there is of the same shape
                token_ids=found["token_ids"] if hidden is None else found["positions"],
                positions=found["positions"],
                caches=caches,
                groups=groups.of_layer,
                metadata=[kind(**_fields(found, group)) for group in range(groups.count)],
                hidden=hidden,
            )
        )
        if model.last:
            out = model.logits(out[found["rows"]])
        unwritten.extend(i for i, cache in enumerate(caches) if cache.new)
        return [out, *(rows for cache in caches for rows in cache.new or ())]

    try:
        tracer = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)
        # that cache holds symbols that hold the cache, by way of C++: it would never be freed
        cache_off = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
        with cache_off, communicator.export():
            graph: GraphModule = tracer(*tensors)
    except ConfigError:
        raise
    except Exception as error:  # whatever torch raises over code that depends on values
        raise ConfigError(
            f"{type(model).__name__} cannot be compiled as one step: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}",
            key="program",
        ) from error
    _check(graph, names, tensors, count, fixed)
    weights = _name_weights(graph, model)
    return TracedStep(graph, _without_unused(graph, names), unwritten, weights)


def _fixed(metadata: Any) -> list[tuple[dataclasses.Field[Any], tuple[int, ...]]]:
    """Fields with dimensions that are the same for every plan."""
    return [(f, f.metadata["fixed"]) for f in dataclasses.fields(metadata) if "fixed" in f.metadata]


def _name_weights(graph: GraphModule, model: Model) -> dict[str, tuple[WeightPart, ...]]:
    """Give the attributes that hold the model's weights their names -> what each of them is."""

    def place(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype

    known = {place(weight.tensor): weight.parts for weight in model.named_weights()}
    found: dict[str, tuple[WeightPart, ...]] = {}
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        if (parts := known.get(place(tensor))) is None:
            continue
        name = re.sub(r"\W", "_", parts[0].name)
        if name not in found:
            graph.register_buffer(name, tensor)
            found[name] = parts
        node.target = name
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in graph.named_buffers(recurse=False) if name not in used]:
        delattr(graph, name)
    graph.recompile()
    return found


def share(tensor: Tensor, part: WeightPart, communicator: Communicator) -> Tensor:
    """A rank's share of a tensor of the checkpoint, as ``part`` cuts it."""
    rows = tensor[part.start : part.start + part.rows]
    if part.offset:
        rows = rows.float() + part.offset
    if part.first_rank_only and communicator.rank > 0:
        rows = torch.zeros_like(rows)
    if part.shard_dim is None:
        return rows
    size = -(-rows.shape[part.shard_dim] // part.num_shards)
    index = communicator.rank * part.num_shards // communicator.world_size
    piece = rows.narrow(
        part.shard_dim,
        start := min(index * size, rows.shape[part.shard_dim]),
        min(size, rows.shape[part.shard_dim] - start),
    )
    if (missing := size - piece.shape[part.shard_dim]) == 0:
        return piece
    shape = list(piece.shape)
    shape[part.shard_dim] = missing
    return torch.cat((piece, piece.new_zeros(shape)), part.shard_dim)


def _fields(inputs: dict[str, Tensor], group: int) -> dict[str, Tensor]:
    """The metadata of one group, by its fields."""
    prefix = f"metadata.{group}."
    return {n.removeprefix(prefix): t for n, t in inputs.items() if n.startswith(prefix)}


def _free_sizes(layers: Sequence[LayerCache], model: Model, fixed: set[int]) -> Iterator[int]:
    """Ascending sizes for dimensions of the traced batch. The tracer takes dimensions of one size
    for one, so none is of the model, of its cache, or ``fixed``."""
    taken = fixed | {size for c in layers for t in c.tensors for size in t.shape}
    return (n for n in itertools.count(3, 2) if n not in taken | {model.hidden_size})


def _example(
    model: Model, block_size: int, wanted: int, seqs: int, longest: int, columns: Sequence[int]
) -> BatchPlan:
    """A batch of ``seqs`` sequences, the first with ``longest`` queries, and ``wanted`` logits. The
    tables of each KvGroup have their number of columns."""
    queries = [longest, *[longest - 1] * (seqs - 1)]
    total = sum(queries)

    def tables(width: int) -> GroupTables:
        lengths = [query + (width - 1) * block_size for query in queries]
        return GroupTables(
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=torch.zeros(seqs, width, dtype=torch.int32),
            slot_mapping=torch.zeros(total, dtype=torch.int64),
            seq_lens_host=lengths,
        )

    first, *others = map(tables, columns)
    return BatchPlan(
        token_ids=torch.zeros(total, dtype=torch.int64),
        positions=torch.zeros(total, dtype=torch.int64),
        query_start=torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        seq_lens=first.seq_lens,
        block_table=first.block_table,
        slot_mapping=first.slot_mapping,
        logits_rows=torch.arange(wanted, dtype=torch.int64),
        query_lens_host=queries,
        seq_lens_host=first.seq_lens_host,
        more_groups=others,
        hidden=None if model.first else torch.zeros(total, model.hidden_size, dtype=model.dtype),
    )


def _check(
    graph: GraphModule,
    names: list[str],
    tensors: list[Tensor],
    count: int,
    allowed: dict[str, tuple[int, ...]],
) -> None:
    """No size of the example was taken for granted, and no torch op works in place."""
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for at, (name, place, tensor) in enumerate(zip(names, places, tensors, strict=True)):
        fixed = tensor.dim() if at < count else 1  # of a cache, the number of blocks alone is free
        for dim in range(min(fixed, 1 if name == "hidden" else fixed)):
            if dim in allowed.get(name, ()):
                continue
            size = place.meta["val"].shape[dim]
            if isinstance(size, int) or size.node.maybe_as_int() is not None:
                raise ConfigError(
                    f"the step cannot be compiled: its code depends on dimension {dim} of {name}",
                    key="program",
                )
    for node in graph.graph.nodes:
        target = node.target
        if isinstance(target, OpOverload) and target.namespace == "aten" and _mutates(target):
            raise ConfigError(
                f"the step cannot be compiled: {target} works in place", key="program"
            )


def _without_unused(graph: GraphModule, names: list[str]) -> list[str]:
    """Erase the inputs that nothing reads -> the names of the others."""
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    used = [name for name, place in zip(names, places, strict=True) if place.users]
    for place in places:
        if not place.users:
            graph.graph.erase_node(place)
    graph.recompile()
    return used


def _mutates(op: OpOverload) -> bool:
    return bool(op._schema.is_mutable)
