"""Cases of ``paged_attention``: odd sizes and edges, then the sizes of real models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.cases import Case, Table
from benchmarks.gpu.compare import Found, compare, tolerance
from vllm_di.components.ops.torch import TorchOps

REFERENCE = TorchOps()
Load = tuple[int, int]
"""(queries, context with them) of a sequence."""
MIXED: tuple[Load, ...] = ((1, 1), (1, 37), (5, 5), (0, 9), (7, 130))
NOWHERE = 2**30
"""Stands in a block table where no block is: whoever reads it reads outside the cache."""


@dataclass(frozen=True)
class Batch:
    """One call, before its tensors are made."""

    loads: Sequence[Load]
    heads: tuple[int, int] = (6, 3)
    size: int = 16
    block: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    window: int | None = None
    soft_cap: float | None = None
    padding: int = 0
    """Rows behind the last sequence's; they become zero."""
    programs: int | None = 1
    """As ``ops.library.programs``: 1 never splits a context, 1000 always; None: the device's."""
    what: str = field(default="", compare=False)

    @property
    def label(self) -> str:
        what = self.what or " ".join(f"{q}/{c}" for q, c in self.loads)
        words = [what, f"heads {self.heads[0]}/{self.heads[1]} size {self.size}"]
        words += [f"block {self.block} {str(self.dtype).removeprefix('torch.')}"]
        more = {"cache": self.cache_dtype, "window": self.window, "cap": self.soft_cap}
        words += [f"{name} {value}" for name, value in more.items() if value is not None]
        return " ".join([*words, f"padding {self.padding} programs {self.programs}"])

    def make(self, device: torch.device) -> tuple[Any, ...]:
        """The op's arguments. Blocks lie in any order and are NaN where no token is; q is a view
        of a wider product."""
        query, kv = self.heads
        generator = torch.Generator(device).manual_seed(0)

        def real(*shape: int) -> Tensor:
            made = torch.randn(shape, dtype=torch.float32, device=device, generator=generator)
            return made.to(self.dtype)

        counts = [-(-context // self.block) for _, context in self.loads]
        total = sum(counts) + 2
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).int()
        table = torch.full((len(self.loads), max(counts, default=0) + 1), NOWHERE).int()
        nan = torch.full(
            (total, kv, self.block, self.size),
            float("nan"),
            dtype=self.cache_dtype or self.dtype,
            device=device,
        )
        keys, values = nan, nan.clone()
        at = 0
        for row, ((_, context), count) in enumerate(zip(self.loads, counts, strict=True)):
            table[row, :count] = order[at : at + count]
            at += count
            place = torch.arange(context)
            slots = table[row, place // self.block].long() * self.block + place % self.block
            k, v = real(context, kv, self.size), real(context, kv, self.size)
            REFERENCE.write_kv(k, v, keys, values, slots.to(device))
        lengths = torch.tensor([q for q, _ in self.loads])
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
        contexts = torch.tensor([c for _, c in self.loads], dtype=torch.int32)
        qkv = real(int(lengths.sum()) + self.padding, (query + 2) * self.size)
        q = qkv[:, : query * self.size].unflatten(1, (query, self.size))
        rest = (starts.to(device), contexts.to(device), table.to(device))
        return (q, keys, values, *rest, self.size**-0.5, self.window, self.soft_cap)

    def judge(self, table: Table) -> list[Found]:
        arguments = self.make(table.device)
        got = table.of(self.programs).paged_attention(*arguments)
        q, keys, values, *rest = arguments
        with sdpa_kernel(SDPBackend.MATH):
            want = REFERENCE.paged_attention(q.float(), keys.float(), values.float(), *rest)
        return [compare(got, want, *tolerance(self.dtype, long=True))]


def edges(dtype: torch.dtype) -> Iterator[Batch]:
    """What ``tests/kernels/triton/interpreted.py`` walks, in each dtype."""
    for programs in (1, 1000):
        yield Batch(MIXED, dtype=dtype, programs=programs)
        for window in (1, 5, 100):
            for cap in (None, 2.0):
                loads = ((1, 300), (5, 40))
                yield Batch(loads, dtype=dtype, window=window, soft_cap=cap, programs=programs)
        yield Batch(((1, 300), (1, 2)), dtype=dtype, padding=6, programs=programs)
    for cap in (1e-3, 1e4):
        yield Batch(((3, 9),), dtype=dtype, soft_cap=cap)
    for heads in ((1, 1), (7, 1), (24, 1), (71, 1), (3, 3)):
        yield Batch(((1, 300), (9, 20)), heads=heads, dtype=dtype, programs=1000)
    sizes = ((8, 7), (24, 32), (64, 16), (80, 64), (96, 32), (112, 16), (128, 32), (192, 32))
    for size, block in (*sizes, (256, 16)):
        small: dict[str, Any] = {"heads": (2, 1), "size": size, "block": block, "dtype": dtype}
        yield Batch(((1, 70), (4, 20)), **small)
        yield Batch(((1, 300),), programs=1000, **small)
        yield Batch(((200, 331),), **small)
    other = torch.float16 if dtype is not torch.float16 else torch.float32
    yield Batch(MIXED, dtype=dtype, cache_dtype=other)


def decodes(dtype: torch.dtype) -> Iterator[Batch]:
    """One query each, at the sizes of real models; splits as the device has them."""
    common: dict[str, Any] = {"heads": (32, 8), "size": 128, "block": 32, "dtype": dtype}
    for programs in (None, 1):
        for batch, context in ((1, 1), (1, 1024), (1, 32768), (4, 8192), (64, 1024)):
            what = f"decode {batch} x {context}"
            yield Batch(((1, context),) * batch, what=what, programs=programs, **common)
    lengths = tuple((1, 1 + 37 * n) for n in range(64))
    yield Batch(lengths, what="decode 64 of 1 to 2332", programs=None, padding=3, **common)
    shapes = (((32, 32), 128), ((14, 2), 64), ((71, 1), 64), ((16, 8), 256), ((32, 32), 96))
    for heads, size in shapes:
        more = common | {"heads": heads, "size": size}
        yield Batch(((1, 1000),) * 8, what="decode 8 x 1000", programs=None, **more)
    gemma = common | {"heads": (8, 4), "size": 256, "window": 512, "soft_cap": 50.0}
    yield Batch(((1, 2000),) * 8, what="decode 8 x 2000", programs=None, **gemma)


def prefills(dtype: torch.dtype) -> Iterator[Batch]:
    """Whole prompts, chunks of prompts, and both beside decodes."""
    common: dict[str, Any] = {"heads": (32, 8), "size": 128, "block": 32, "dtype": dtype}
    common |= {"programs": None}
    yield Batch(((2048, 2048),) * 8, what="prefill 8 x 2048", **common)
    yield Batch(((1, 1), (17, 17), (2047, 2047), (129, 129)), **common)
    yield Batch(((512, 4096),) * 4, what="chunk 4 x 512 of 4096", **common)
    both = (*((1, 1000 + n) for n in range(32)), (512, 512), (300, 900))
    yield Batch(both, what="32 decodes, 2 prompts", padding=5, **common)
    for heads, size in (((32, 32), 128), ((14, 2), 64), ((71, 1), 64), ((16, 8), 256)):
        more = common | {"heads": heads, "size": size}
        yield Batch(((700, 700), (100, 1000)), **more)
    gemma = common | {"heads": (8, 4), "size": 256, "window": 512, "soft_cap": 50.0}
    yield Batch(((1500, 1500),), **gemma)


def no_context(table: Table) -> list[Found]:
    """What a captured graph pads a batch with: a query each, and no token to see."""
    found = []
    for programs in (1, 1000):
        keys = torch.full((20, 1, 16, 16), float("nan"), device=table.device)
        starts = torch.arange(4, dtype=torch.int32, device=table.device)
        blocks = torch.zeros(3, 20, dtype=torch.int32, device=table.device)
        q = torch.ones(3, 2, 16, device=table.device)
        rest = (starts, starts[:3] * 0, blocks, 1.0, None, None)
        out = table.of(programs).paged_attention(q, keys, keys, *rest)
        found.append(compare(out, torch.zeros_like(out), 0.0, 0.0))
    return found


def cases(kind: str, dtype: torch.dtype) -> Iterator[Case]:
    makers = {"edges": edges, "decode": decodes, "prefill": prefills}
    for batch in makers[kind](dtype):
        yield Case(batch.label, batch.judge)
    if kind == "edges" and dtype is torch.float32:
        yield Case("no context", no_context)
