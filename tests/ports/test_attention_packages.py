"""attention=flash_attn and attention=flashinfer against stand-ins with the packages' signatures.

The stand-ins compute attention from nothing but their arguments, as the packages document them, so
that a wrong stride, count, window or scale gives a wrong result.
"""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any

import pytest
import torch
from tests.components.ops.libraries import close, random
from torch import Tensor

from vllm_di.components.attention.paged import PagedAttention
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    LayerCache,
    Placement,
)
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.ops.torch import TorchOps, attend
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.schema import check
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError, PortError
from vllm_di.ports.cuda.flash_attn import FlashAttention
from vllm_di.ports.cuda.flashinfer import FlashInferAttention

SEQUENCES = [(1, 1), (3, 300), (5, 5), (1, 256)]
"""(queries, context) of each sequence."""
SPECS = [
    AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, scale=0.1),
    AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, scale=0.125, window=7),
    AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, scale=0.2, soft_cap=3.0),
]


def flash_attn_varlen_func(  # flash-attn 2.8
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """k and v [blocks, page, kv_heads, head_size] with a block table; page a multiple of 256."""
    assert causal and block_table is not None and softmax_scale is not None
    assert k.shape[1] % 256 == 0 and k.stride(-1) == 1 and v.stride(-1) == 1
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
    out = torch.empty_like(q)
    starts, ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert starts[-1] == len(q) and max_seqlen_q == max(b - a for a, b in _pairs(starts))
    for row, ((a, b), (c, d)) in enumerate(zip(_pairs(starts), _pairs(ends), strict=True)):
        assert d - c <= max_seqlen_k
        blocks = block_table[row, : -(-(d - c) // k.shape[1])].long()
        keys, values = (cache[blocks].flatten(0, 1)[: d - c].transpose(0, 1) for cache in (k, v))
        assert window_size[1] <= 0
        window = None if window_size[0] < 0 else window_size[0] + 1
        out[a:b] = attend(q[a:b], keys, values, softmax_scale, window, softcap or None)
    return out


class Wrapper:
    """flashinfer 0.6's BatchPrefillWithPagedKVCacheWrapper, as far as it is documented."""

    plans = 0

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "HND"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        indices = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert causal and all(t.dtype == torch.int32 for t in indices)
        Wrapper.plans += 1
        self.queries, self.pages = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self.indices, self.last = paged_kv_indices.long(), paged_kv_last_page_len.tolist()
        self.heads, self.size = (num_qo_heads, num_kv_heads, head_dim_qk), page_size
        self.scale, self.cap = sm_scale or head_dim_qk**-0.5, logits_soft_cap
        self.window = None if window_left < 0 else window_left + 1
        self.dtypes = q_data_type, kv_data_type

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        keys, values = paged_kv_cache  # [pages, kv_heads, page_size, head_size] each
        assert (q.shape[1], keys.shape[1], q.shape[2]) == self.heads
        assert keys.shape[2] == self.size and (q.dtype, keys.dtype) == self.dtypes
        assert len(q) == self.queries[-1]
        out = torch.empty_like(q)
        for row, ((a, b), (c, d)) in enumerate(
            zip(_pairs(self.queries), _pairs(self.pages), strict=True)
        ):
            assert 1 <= self.last[row] <= self.size
            length = (d - c - 1) * self.size + self.last[row]
            k, v = (
                cache[self.indices[c:d]].transpose(0, 1).flatten(1, 2)[:, :length]
                for cache in (keys, values)
            )
            out[a:b] = attend(q[a:b], k, v, self.scale, self.window, self.cap)
        return out


def _pairs(values: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(values))


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn, flashinfer = types.ModuleType("flash_attn"), types.ModuleType("flashinfer")
    flash_attn.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    flashinfer.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)


def parts(block_size: int = 256) -> tuple[HostDevice, HndLayout]:
    device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
    return device, HndLayout(device, block_size=block_size, dtype="auto")


def backend(name: str, block_size: int = 256) -> AttentionBackend:
    device, layout = parts(block_size)
    if name == "flash_attn":
        return FlashAttention(TorchOps(), layout)
    return FlashInferAttention(device, TorchOps(), layout, workspace="1MiB")


def batch(padding: int, block_size: int = 256) -> tuple[BatchPlan, LayerCache]:
    """Blocks in falling order, full of numbers, NaN where no sequence has a token."""
    counts = [-(-context // block_size) for _, context in SEQUENCES]
    total = sum(counts)
    table = torch.full((len(SEQUENCES), max(counts)), 0, dtype=torch.int32)
    keys = torch.full((total + 1, 2, block_size, 64), float("nan"))
    values, slots, at = keys.clone(), [], total
    for row, ((queries, context), count) in enumerate(zip(SEQUENCES, counts, strict=True)):
        table[row, :count] = torch.arange(at, at - count, -1)
        at -= count
        place = torch.arange(context)
        own = table[row, place // block_size].long() * block_size + place % block_size
        k, v = random(context, 2, 64, seed=row), random(context, 2, 64, seed=row + 9)
        TorchOps().write_kv(k, v, keys, values, own)
        slots += own[context - queries :].tolist()
    lengths = [queries for queries, _ in SEQUENCES]
    rows = sum(lengths)
    plan = BatchPlan(
        token_ids=torch.zeros(rows + padding, dtype=torch.int64),
        positions=torch.zeros(rows + padding, dtype=torch.int64),
        query_start=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        seq_lens=torch.tensor([context for _, context in SEQUENCES], dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.tensor(slots + [-1] * padding),
        logits_rows=torch.arange(rows),
        query_lens_host=lengths,
        seq_lens_host=[context for _, context in SEQUENCES],
    )
    return plan, LayerCache((keys, values))


@pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_step_gives_what_the_reference_gives(name: str, padding: int) -> None:
    attention, reference = backend(name), PagedAttention(TorchOps(), parts()[1])
    plan, cache = batch(padding)
    metadata = attention.build(plan)
    Wrapper.plans = 0
    for layer in range(2):
        for spec in SPECS:
            attention.check(spec)
            rows = len(plan.token_ids)
            q = random(rows, 4, 64, seed=layer)
            k, v = random(rows, 2, 64, seed=layer + 3), random(rows, 2, 64, seed=layer + 6)
            want = reference.forward(q, k, v, cache, plan, spec)
            close(attention.forward(q, k, v, cache, metadata, spec), want)
    assert Wrapper.plans in (0, len(SPECS))  # once a step for each kind of layer
    attention.close()


def test_flashinfer_takes_small_blocks_too() -> None:
    attention, (plan, cache) = backend("flashinfer", 16), batch(0, 16)
    q, k, v = random(10, 4, 64), random(10, 2, 64, seed=3), random(10, 2, 64, seed=6)
    want = PagedAttention(TorchOps(), parts(16)[1]).forward(q, k, v, cache, plan, SPECS[0])
    close(attention.forward(q, k, v, cache, attention.build(plan), SPECS[0]), want)


def test_steps_are_not_captured() -> None:
    assert not FlashAttention.reuses and not FlashInferAttention.reuses


def test_limits_name_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"reads blocks of 256, 512, 768, 1024 tokens, not 32"):
        FlashAttention(TorchOps(), parts(32)[1])
    odd: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "scale": 1.0}
    with pytest.raises(ConfigError, match=r"up to 256, not 320; choose attention=triton"):
        backend("flash_attn").check(AttentionSpec(head_size=320, **odd))
    with pytest.raises(ConfigError, match=r"64, 128, 256, not 96; choose attention=triton"):
        backend("flashinfer").check(AttentionSpec(head_size=96, **odd))


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("flash_attn", "flash_attn", "pip install flash-attn"),
        ("flashinfer", "flashinfer", "pip install flashinfer-python"),
    ],
)
def test_an_absent_package_is_named(
    name: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what import then says: no such module
    with pytest.raises(PortError, match=rf"attention={name}: the package {package} .*; {install}"):
        backend(name)


@pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])
def test_auto_blocks_are_those_that_it_reads(name: str) -> None:
    """flash-attn's pages, where ``auto`` stands; another number is an error with its key."""
    choices = ["platform=cpu", "model=tiny", "ops=torch", "graph=eager", f"attention={name}"]
    slots = ("attention", "kv_layout")
    with opened(WorkerContainer, assemble(choices), placement=Placement(), only=slots) as container:
        assert container.kv_layout().block_size == (256 if name == "flash_attn" else 32)
    with opened(
        WorkerContainer, assemble(choices), placement=Placement(), only=("kv_layout",)
    ) as container:
        assert container.kv_layout().block_size == (256 if name == "flash_attn" else 32)
    with (
        pytest.raises(ConfigError, match=r"command line: kv_layout.block_size=16: kv_layout\."),
        opened(
            WorkerContainer,
            assemble([*choices, "attention=flash_attn", "kv_layout.block_size=16"]),
            placement=Placement(),
            only=slots,
        ),
    ):
        pass


@pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])
def test_the_option_fits_its_slot(name: str) -> None:
    assembly = assemble(["platform=cuda", "model=tiny", f"attention={name}"])
    plan = check(WorkerContainer, assembly, replaced=["placement"])
    assert plan.parts["attention"].cls.__module__ == f"vllm_di.ports.cuda.{name}"
