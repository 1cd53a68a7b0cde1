"""The two backends agree on one batch, and refuse what makes no sense."""

from __future__ import annotations

import itertools

import pytest
import torch

from vllm_di.components.attention.paged import PagedAttention
from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import AttentionSpec, BatchPlan, TracedCache
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.kv_layout.nhd import NhdLayout
from vllm_di.components.messages import KvSpec
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.errors import ConfigError


def device() -> HostDevice:
    return HostDevice(threads=2, memory_budget=None, default_dtype="float32")


def layout() -> HndLayout:
    return HndLayout(device(), block_size=4, dtype="auto")


def spec(**changes: object) -> AttentionSpec:
    fields = {"num_heads": 6, "num_kv_heads": 2, "head_size": 8, "scale": 0.3}
    return AttentionSpec(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"window": 3}, {"soft_cap": 1.5}])
def test_all_give_one_answer(changes: dict[str, object]) -> None:
    on, kind = layout(), spec(**changes)
    caches = [
        on.allocate([KvSpec(layer=0, num_kv_heads=2, head_size=8)], 9, torch.float32)[0]
        for _ in range(3)
    ]
    old_k, old_v = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    for cache in caches:
        on.write(cache, old_k, old_v, torch.tensor([8, 9, 10, 11, 0]))
    plan = BatchPlan(
        token_ids=torch.zeros(4, dtype=torch.long),
        positions=torch.tensor([5, 0, 1, 2]),
        query_start=torch.tensor([0, 1, 4], dtype=torch.int32),
        seq_lens=torch.tensor([6, 3], dtype=torch.int32),
        block_table=torch.tensor([[2, 0], [5, 7]], dtype=torch.int32),
        slot_mapping=torch.tensor([1, 20, 21, 22]),
        logits_rows=torch.arange(2),
        query_lens_host=[1, 3],
        seq_lens_host=[6, 3],
    )
    q, k, v = torch.randn(4, 6, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    backends = (PagedAttention(SelectedOps(TorchOps()), on), SdpaAttention(on))
    paged, gathered = (
        backend.forward(q, k, v, cache, backend.build(plan), kind)
        for backend, cache in zip(backends, caches[:2], strict=True)
    )
    torch.testing.assert_close(paged, gathered)
    assert torch.equal(caches[0].key, caches[1].key)
    # the form that a compiled program traces: it leaves the writing to the program
    before, backend = caches[2].key.clone(), SdpaAttention(on)
    cache = TracedCache(caches[2].tensors)
    traced = backend.forward(q, k, v, cache, backend.export()(plan), kind)
    torch.testing.assert_close(traced, gathered)
    assert torch.equal(cache.key, before)
    assert cache.new is not None and cache.new[0] is k and cache.new[1] is v


@pytest.mark.parametrize("changes", [{}, {"window": 3}, {"soft_cap": 1.5}])
def test_sinks_join_the_softmax_and_add_no_value(changes: dict[str, object]) -> None:
    """One sequence of seven tokens, five of them in the cache, against the plain formula."""
    assert not PagedAttention.takes_sinks
    on, sinks = layout(), torch.randn(6)
    cache = on.allocate([KvSpec(layer=0, num_kv_heads=2, head_size=8)], 3, torch.float32)[0]
    k, v, q = torch.randn(7, 2, 8), torch.randn(7, 2, 8), torch.randn(2, 6, 8)
    on.write(cache, k[:5], v[:5], torch.tensor([8, 9, 10, 11, 0]))
    plan = BatchPlan(
        token_ids=torch.zeros(2, dtype=torch.long),
        positions=torch.tensor([5, 6]),
        query_start=torch.tensor([0, 2], dtype=torch.int32),
        seq_lens=torch.tensor([7], dtype=torch.int32),
        block_table=torch.tensor([[2, 0]], dtype=torch.int32),
        slot_mapping=torch.tensor([1, 2]),
        logits_rows=torch.arange(2),
        query_lens_host=[2],
        seq_lens_host=[7],
    )
    want = torch.zeros(2, 6, 8)
    for row, head in itertools.product(range(2), range(6)):
        last, first = 5 + row, max(0, 5 + row - 2) if "window" in changes else 0
        scores = k[first : last + 1, head // 3] @ q[row, head] * 0.3
        if "soft_cap" in changes:
            scores = 1.5 * torch.tanh(scores / 1.5)
        weights = scores.exp() / (scores.exp().sum() + sinks[head].exp())
        want[row, head] = weights @ v[first : last + 1, head // 3]
    backend, kind = SdpaAttention(on), spec(sinks=sinks, **changes)
    traced = TracedCache(cache.tensors)
    found = backend.forward(q, k[5:], v[5:], traced, backend.export()(plan), kind)
    torch.testing.assert_close(found, want)
    found = backend.forward(q, k[5:], v[5:], cache, backend.build(plan), kind)
    torch.testing.assert_close(found, want)


def test_export_wants_a_layout_that_can_be_traced() -> None:
    other = NhdLayout(device(), block_size=4, dtype="auto")
    other.gathers_blocks = False
    with pytest.raises(ConfigError, match="gathers_blocks, and 'nhd' does not; kv_layout=hnd"):
        SdpaAttention(other).export()
    with pytest.raises(ConfigError, match=r"no export\(\) .* attention=sdpa has one"):
        PagedAttention(SelectedOps(TorchOps()), layout()).export()


def test_paged_refuses_a_layout_that_it_cannot_read() -> None:
    other = layout()
    other.name = "nhd"
    with pytest.raises(
        ConfigError, match="reads the layouts hnd, not 'nhd'; take kv_layout=hnd, or sdpa"
    ):
        PagedAttention(SelectedOps(TorchOps()), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, "cannot share 4 kv heads evenly"),
        ({"num_kv_heads": 0}, "cannot share 0"),
        ({"head_size": 0}, "head size 0"),
        ({"window": 0}, "sliding window 0"),
        ({"soft_cap": 0.0}, "soft cap 0.0"),
        ({"soft_cap": float("nan")}, "soft cap nan"),
    ],
)
def test_layers_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    for backend in (SdpaAttention(layout()), PagedAttention(SelectedOps(TorchOps()), layout())):
        with pytest.raises(ConfigError, match=message):
            backend.check(spec(**changes))
