"""Prefill and decode from different components: the answer of either, on one cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.components.attention.test_backends import layout, spec
from torch import Tensor

from vllm_di import LLM, SamplingParams
from vllm_di.components.attention.hybrid import HybridAttention
from vllm_di.components.attention.paged import PagedAttention
from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.interfaces import AttentionSpec, BatchPlan, LayerCache
from vllm_di.components.messages import KvSpec
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.containers.assembly import assemble
from vllm_di.containers.schema import check
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["a", "hello world", "x" * 70]


class Seen(SdpaAttention):
    """Notes the sequences that it is given."""

    def __init__(self, on: Any) -> None:
        super().__init__(on)
        self.lens: list[list[int]] = []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        assert len(q) == len(k) == len(metadata.slot_mapping) >= sum(metadata.query_lens_host)
        assert metadata.query_start.tolist()[-1] == sum(metadata.query_lens_host)
        self.lens.append(metadata.query_lens_host)
        return super().forward(q, k, v, cache, metadata, spec)


def batch(queries: list[int], padding: int = 0) -> BatchPlan:
    """Fresh sequences after five cached tokens each, two blocks of four tokens a sequence."""
    total = sum(queries)
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(5, 5 + n) for n in queries])
    owner = torch.repeat_interleave(torch.arange(len(queries)), torch.tensor(queries))
    table = torch.arange(3 * len(queries), dtype=torch.int32).view(-1, 3)
    slots = table[owner, positions // 4].long() * 4 + positions % 4
    return BatchPlan(
        token_ids=torch.zeros(total + padding, dtype=torch.long),
        positions=torch.cat([positions, torch.zeros(padding, dtype=torch.long)]),
        query_start=starts,
        seq_lens=torch.tensor([5 + n for n in queries], dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.cat([slots, torch.full((padding,), -1)]),
        logits_rows=torch.arange(len(queries)),
        query_lens_host=queries,
        seq_lens_host=[5 + n for n in queries],
    )


@pytest.mark.parametrize(
    ("queries", "decode", "prefill"),
    [
        ([1, 1, 3, 4], [1, 1], [3, 4]),
        ([1, 1], [1, 1], None),
        ([3, 4], None, [3, 4]),
        ([1, 4, 1], [1], [4, 1]),
    ],
)
@pytest.mark.parametrize("padding", [0, 2])
def test_each_half_gets_its_rows(
    queries: list[int], decode: list[int] | None, prefill: list[int] | None, padding: int
) -> None:
    on, kind, plan = layout(), spec(), batch(queries, padding)
    caches = [
        on.allocate([KvSpec(layer=0, num_kv_heads=2, head_size=8)], 12, torch.float32)[0]
        for _ in range(2)
    ]
    old = torch.randn(2, 48, 2, 8)
    for cache in caches:
        on.write(cache, old[0], old[1], torch.arange(48))
    rows = len(plan.token_ids)
    q, k, v = torch.randn(rows, 6, 8), torch.randn(rows, 2, 8), torch.randn(rows, 2, 8)
    whole = SdpaAttention(on)
    want = whole.forward(q, k, v, caches[0], whole.build(plan), kind)
    halves = Seen(on), Seen(on)
    backend = HybridAttention(on, prefill=halves[0], decode=halves[1])
    backend.check(kind)
    got = backend.forward(q, k, v, caches[1], backend.build(plan), kind)
    used = sum(queries)
    torch.testing.assert_close(got[:used], want[:used])
    assert got.shape == want.shape
    assert torch.equal(caches[0].key, caches[1].key)
    assert halves[0].lens == ([] if prefill is None else [prefill])
    assert halves[1].lens == ([] if decode is None else [decode])


def test_halves_must_read_the_layout_that_they_share() -> None:
    on = layout()
    paged, sdpa = PagedAttention(SelectedOps(TorchOps()), on), SdpaAttention(on)
    other = layout()
    other.name = "nhd"
    HybridAttention(other, prefill=sdpa, decode=sdpa)
    with pytest.raises(ConfigError, match=r"decode: PagedAttention reads .* hnd, .*nhd"):
        HybridAttention(other, prefill=sdpa, decode=paged)
    with pytest.raises(ConfigError, match="no export"):
        HybridAttention(on, prefill=sdpa, decode=paged).export()


def test_a_step_of_decodes_can_be_replayed() -> None:
    on = layout()
    paged, sdpa = PagedAttention(SelectedOps(TorchOps()), on), SdpaAttention(on)
    mixed = HybridAttention(on, prefill=sdpa, decode=paged)
    assert mixed.reuses == {"record"}  # the reference asks the host, which no capture can
    asked = ["record" in mixed.reuses_step(mixed.build(batch(q))) for q in ([1, 1], [1, 3], [3])]
    assert asked == [True, False, False]
    assert not HybridAttention(on, prefill=paged, decode=sdpa).reuses


def tokens(*overrides: str) -> tuple[list[list[int]], Any]:
    chosen = ["platform=cpu", "model.dtype=float32", *overrides]
    with LLM("tiny", overrides=chosen) as llm:
        answers = llm.generate(PROMPTS, GREEDY) + llm.generate(PROMPTS, GREEDY)
        return [a.outputs[0].token_ids for a in answers], llm.assembly


def test_tokens_are_those_of_either_backend(caplog: pytest.LogCaptureFixture) -> None:
    want, _ = tokens()
    assert tokens("attention=hybrid")[0] == want
    assert not [r for r in caplog.records if "not replayed" in r.message]
    assert tokens("attention=hybrid", "attention.prefill=paged", "attention.decode=sdpa")[0] == want
    # a library's op from elsewhere beside it, and chunks of prompts between decodes
    mixed = ["attention=hybrid", "ops.rms_norm=torch", "scheduler.max_num_batched_tokens=16"]
    assert tokens(*mixed, "scheduler.max_num_seqs=4")[0] == want


def test_halves_are_named_or_written_out(tmp_path: Path) -> None:
    folder = tmp_path / "attention"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "_target_: vllm_di.components.attention.hybrid.HybridAttention\n"
        "prefill: paged\n"
        "decode:\n"
        "  _target_: vllm_di.components.attention.sdpa.SdpaAttention\n"
    )
    found = assemble(["platform=cpu", "model=tiny", "attention=mine"], [tmp_path])
    part = check(WorkerContainer, found, only=["attention"], replaced=["placement"])
    halves = part.parts["attention"].parts
    assert halves["prefill"].cls is PagedAttention and halves["decode"].cls is SdpaAttention


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("attention.prefill=pagd", r"attention\.prefill: no option 'pagd'.*did you mean 'paged'"),
        (
            "attention.decode=3",
            r"command line: attention\.decode=3: attention\.decode: expected a node of keys",
        ),
    ],
)
def test_halves_that_are_no_backends(override: str, words: str) -> None:
    def build() -> None:
        found = assemble(["platform=cpu", "model=tiny", "attention=hybrid", override])
        check(WorkerContainer, found, only=["attention"], replaced=["placement"])

    with pytest.raises(ConfigError, match=words):
        build()
