"""What is written to the cache is there bit for bit, and no other slot changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_di.components.interfaces import BatchPlan, KvLayout, LayerCache
from vllm_di.components.messages import KvSpec
from vllm_di.conformance.numbers import DTYPES
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.paged import Load, attend_through, kv_spec, num_blocks, place, spec_of
from vllm_di.conformance.subject import Subject

BLOCKS = 7


def everything(layout: KvLayout, cache: LayerCache, blocks: int) -> tuple[Tensor, Tensor]:
    """All slots of a cache on the host: keys, values [slots, kv_heads, head_size]."""
    device = cache.key.device
    table = torch.arange(blocks, dtype=torch.int32, device=device)
    found = layout.gather(cache, table, blocks * layout.block_size)
    return found[0].cpu().clone(), found[1].cpu().clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [16, 64, 128])
def test_writes(subject: Subject, record: Record, dtype: str, head_size: int) -> None:
    """In any order, with dropped and overwritten tokens: only the addressed slots change."""
    kind = subject.dtype(dtype)
    _declared(subject, head_size)
    record.feature(dtype)
    spec = KvSpec(layer=0, num_kv_heads=3, head_size=head_size)
    with subject.parts("kv_layout", "device") as container, torch.inference_mode():
        layout, device = container.kv_layout(), container.device().torch_device
        generator = torch.Generator().manual_seed(subject.seed)
        slots_in_all = BLOCKS * layout.block_size
        cache = layout.allocate([spec], BLOCKS, kind)[0]
        if layout.dtype_name not in ("auto", dtype):
            raise NotDeclared(f"the cache's dtype is {layout.dtype_name}")
        if not cache.key.is_floating_point():
            raise NotDeclared(f"the cache holds {cache.key.dtype}: not bit for bit")
        keys, values = everything(layout, cache, BLOCKS)
        assert not keys.any() and not values.any(), "a new cache is not all zeros"
        for count in (0, 1, 2, layout.block_size, layout.block_size + 1, slots_in_all):
            k, v = (torch.randn(count, 3, head_size, generator=generator).to(kind) for _ in "kv")
            slots = torch.randperm(slots_in_all, generator=generator)[:count]
            slots[1::3] = -1
            layout.write(cache, k.to(device), v.to(device), slots.to(device))
            keep = slots != -1
            keys[slots[keep]], values[slots[keep]] = k[keep], v[keep]
            found = everything(layout, cache, BLOCKS)
            assert torch.equal(found[0], keys), f"keys differ after a write of {count}"
            assert torch.equal(found[1], values), f"values differ after a write of {count}"


def tails(plan: BatchPlan, block_size: int) -> Tensor:
    """Slots of each sequence's last block that hold no token after the step."""
    found = [torch.empty(0, dtype=torch.int64)]
    for blocks, length in zip(plan.block_table.cpu(), plan.seq_lens_host, strict=True):
        last = int(blocks[(length - 1) // block_size]) * block_size
        found.append(torch.arange(last + (length - 1) % block_size + 1, last + block_size))
    return torch.cat(found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_writes(subject: Subject, record: Record, dtype: str) -> None:
    """What attention itself writes: the new tokens, at their slots, and nothing else, except zeros
    in the unused rest of a sequence's last block where that is declared."""
    kind = subject.dtype(dtype)
    record.feature(dtype)
    size = 64 if subject.declared.head_sizes is None else subject.declared.head_sizes[0]
    spec = spec_of(4, 2, size)
    with (
        subject.parts("attention", "kv_layout", "device") as container,
        torch.inference_mode(),
    ):
        layout, device = container.kv_layout(), container.device().torch_device
        backend = container.attention()
        block = layout.block_size
        loads = [Load(block - 1, 1), Load(0, block + 2), Load(3, 1), Load(block, 4)]
        total = num_blocks(loads, block)
        cache = layout.allocate([kv_spec(spec)], total, kind)[0]
        if not cache.key.is_floating_point() or cache.key.dtype != kind:
            raise NotDeclared(f"the cache holds {cache.key.dtype}: not bit for bit")
        batch = place(
            loads,
            spec,
            layout,
            cache,
            total_blocks=total,
            dtype=kind,
            device=device,
            seed=subject.seed,
        )
        keys, values = everything(layout, cache, total)
        attend_through(backend, batch, cache, spec)
        slots = batch.plan.slot_mapping.cpu()
        keys[slots], values[slots] = batch.k, batch.v
        found = everything(layout, cache, total)
        tail = tails(batch.plan, block) if subject.declared.clears_block_tail else slots[:0]
        for name, now, wanted in (("keys", found[0], keys), ("values", found[1], values)):
            cleared = tail[(now[tail] == 0).flatten(1).all(1)]
            wanted[cleared] = 0
            assert torch.equal(now.isnan(), wanted.isnan()), f"{name}: the wrong slots changed"
            assert torch.equal(now.nan_to_num(), wanted.nan_to_num()), f"{name} are not those given"


def test_block_sizes(subject: Subject, record: Record) -> None:
    """Each declared block size, or two sizes where any is allowed: the layout has it, and blocks
    hold that many tokens."""
    declared, kind = subject.declared.block_sizes, subject.dtype(subject.declared.dtypes[0])
    settable = subject.has_key("kv_layout.block_size")
    size = 64 if subject.declared.head_sizes is None else subject.declared.head_sizes[0]
    spec = KvSpec(layer=0, num_kv_heads=2, head_size=size)
    if not settable:
        with subject.parts("kv_layout") as container:
            own = container.kv_layout().block_size
        assert declared is None or own in declared, f"its blocks hold {own}, it claims {declared}"
        return
    for block_size in declared or (8, 64):
        more = [f"{stage}kv_layout.block_size={block_size}" for stage in subject.stages]
        with subject.parts("kv_layout", "device", more=more) as container:
            layout, device = container.kv_layout(), container.device().torch_device
            assert layout.block_size == block_size, f"{layout.block_size}, not {block_size}"
            cache = layout.allocate([spec], BLOCKS, kind)[0]
            if not cache.key.is_floating_point() or cache.key.dtype != kind:
                raise NotDeclared(f"the cache holds {cache.key.dtype}: not bit for bit")
            count = BLOCKS * block_size
            k = torch.arange(count, dtype=torch.int64)[:, None, None].expand(-1, 2, size) % 64
            written = (k.to(kind).to(device), (k + 1).to(kind).to(device))
            layout.write(cache, *written, torch.arange(count, dtype=torch.int64, device=device))
            for found, wanted in zip(everything(layout, cache, BLOCKS), written, strict=True):
                assert torch.equal(found, wanted.cpu()), f"blocks of {block_size}"
    record.figure(block_sizes=list(declared or (8, 64)))


def test_bytes_per_block(subject: Subject) -> None:
    """A block takes the bytes that the layout says."""
    kind = subject.dtype(subject.declared.dtypes[0])
    size = 64 if subject.declared.head_sizes is None else subject.declared.head_sizes[0]
    specs = [KvSpec(layer=i, num_kv_heads=2, head_size=size) for i in range(3)]
    with subject.parts("kv_layout") as container:
        layout = container.kv_layout()
        caches = layout.allocate(specs, BLOCKS, kind)
        taken = sum(_extent(tensor) for cache in caches for tensor in cache.tensors)
        said = BLOCKS * layout.bytes_per_block(specs, kind)
        assert said == taken, f"the layout says {said} bytes for {BLOCKS} blocks, it takes {taken}"


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last, with the gaps between rows."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return max(size * stride for size, stride in sizes) * tensor.element_size()


def _declared(subject: Subject, head_size: int) -> None:
    sizes = subject.declared.head_sizes
    if sizes is not None and head_size not in sizes:
        raise NotDeclared(f"its head sizes are {', '.join(map(str, sizes))}")
