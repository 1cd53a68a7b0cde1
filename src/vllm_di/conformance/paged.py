"""Batches over a paged cache, for the checks of attention: random block tables, poisoned slots, and
the answer in plain fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    KvLayout,
    LayerCache,
)
from vllm_di.components.messages import KvSpec
from vllm_di.components.ops.torch import attend
from vllm_di.conformance.outcomes import NotDeclared

GAP = 8
"""Elements between two tokens: 16 bytes, as vendors' kernels align heads."""


@dataclass
class Load:
    """One sequence of a batch: tokens in the cache before, tokens that run now."""

    before: int
    queries: int

    @property
    def length(self) -> int:
        return self.before + self.queries


@dataclass
class Paged:
    """A batch with its keys and values, whole on the host in the cache's dtype."""

    plan: BatchPlan
    q: Tensor  # [tokens, heads, head_size]
    k: Tensor  # [tokens, kv_heads, head_size]
    v: Tensor
    keys: list[Tensor]  # of each sequence [length, kv_heads, head_size]
    values: list[Tensor]
    loads: list[Load]

    def expected(self, spec: AttentionSpec) -> Tensor:
        """[tokens, heads, head_size] in fp32."""
        parts, start = [], 0
        for load, keys, values in zip(self.loads, self.keys, self.values, strict=True):
            q = self.q[start : start + load.queries].float()
            start += load.queries
            k, v = keys.float().transpose(0, 1), values.float().transpose(0, 1)
            parts.append(attend(q, k, v, spec.scale, spec.window, spec.soft_cap))
        return torch.cat(parts)


def spec_of(
    heads: int,
    kv_heads: int,
    head_size: int,
    window: int | None = None,
    soft_cap: float | None = None,
) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, head_size, head_size**-0.5, window, soft_cap)


def kv_spec(spec: AttentionSpec) -> KvSpec:
    return KvSpec(
        layer=0,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        kind="full" if spec.window is None else "sliding",
        window=spec.window,
    )


def num_blocks(loads: Sequence[Load], block_size: int) -> int:
    """Blocks for ``loads``, and some that no sequence holds."""
    return sum(-(-load.length // block_size) for load in loads) + 5


def place(
    loads: Sequence[Load],
    spec: AttentionSpec,
    layout: KvLayout,
    cache: LayerCache,
    *,
    total_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Paged:
    """Random keys and values of all sequences; those before this step are written through the
    layout, to blocks in random order, after every slot of the cache was poisoned with NaN."""
    generator = torch.Generator().manual_seed(seed)
    size, heads = layout.block_size, (spec.num_kv_heads, spec.head_size)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, generator=generator).to(dtype)

    poison(cache, layout, total_blocks, heads, dtype, device)
    free = (torch.randperm(total_blocks - 1, generator=generator) + 1).tolist()
    columns = max(-(-load.length // size) for load in loads)
    table = torch.zeros(len(loads), columns, dtype=torch.int32)
    keys = [random(load.length, *heads) for load in loads]
    values = [random(load.length, *heads) for load in loads]
    old_slots: list[Tensor] = []
    new_slots: list[Tensor] = []
    for row, load in enumerate(loads):
        used = -(-load.length // size)
        blocks, free = torch.tensor(free[:used], dtype=torch.int64), free[used:]
        table[row, :used] = blocks.int()
        positions = torch.arange(load.length)
        slots = blocks[positions // size] * size + positions % size
        old_slots.append(slots[: load.before])
        new_slots.append(slots[load.before :])
    before = [load.before for load in loads]
    old_keys = torch.cat([k[:n] for k, n in zip(keys, before, strict=True)])
    old_values = torch.cat([v[:n] for v, n in zip(values, before, strict=True)])
    layout.write(cache, *(t.to(device) for t in (old_keys, old_values, torch.cat(old_slots))))
    queries = [load.queries for load in loads]
    tokens = sum(queries)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    plan = BatchPlan(
        token_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.cat([torch.arange(a.before, a.length) for a in loads]).to(device),
        query_start=starts.to(device),
        seq_lens=torch.tensor([a.length for a in loads], dtype=torch.int32, device=device),
        block_table=table.to(device),
        slot_mapping=torch.cat(new_slots).to(device),
        logits_rows=torch.arange(tokens, device=device),
        query_lens_host=queries,
        seq_lens_host=[load.length for load in loads],
    )
    return Paged(
        plan=plan,
        q=random(tokens, spec.num_heads, spec.head_size),
        k=torch.cat([k[n:] for k, n in zip(keys, before, strict=True)]),
        v=torch.cat([v[n:] for v, n in zip(values, before, strict=True)]),
        keys=keys,
        values=values,
        loads=list(loads),
    )


def poison(
    cache: LayerCache,
    layout: KvLayout,
    total_blocks: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """NaN in every slot: a kernel that reads a wrong slot returns NaN."""
    count = total_blocks * layout.block_size
    nan = torch.full((count, *heads), float("nan"), dtype=dtype, device=device)
    layout.write(cache, nan, nan, torch.arange(count, device=device))


def _beside_nan(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device whose tokens have NaN between them, as q, k and v are views of one
    product. x [tokens, heads, head_size]."""
    size = x.shape[1] * x.shape[2]
    wide = torch.full((len(x), size + GAP), float("nan"), dtype=x.dtype)
    wide[:, :size] = x.flatten(1)
    viewed: Tensor = wide.to(device)[:, :size].unflatten(1, x.shape[1:])
    return viewed


def attend_through(
    backend: AttentionBackend, batch: Paged, cache: LayerCache, spec: AttentionSpec
) -> Tensor:
    """The backend's own answer to a batch. Raises NotDeclared for one that has none by itself."""
    device = batch.plan.positions.device
    backend.check(spec)
    metadata = backend.build(batch.plan)
    q, k, v = (_beside_nan(t, device) for t in (batch.q, batch.k, batch.v))
    try:
        return backend.forward(q, k, v, cache, metadata, spec)
    except NotImplementedError as error:  # a compiled program has it inside
        raise NotDeclared(f"attention runs inside the program alone: {error}") from error
