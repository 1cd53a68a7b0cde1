"""The port on a simulated Gaudi. Run in a process of their own."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_di import LLM, SamplingParams
from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.interfaces import (
    AttentionSpec,
    BatchPlan,
    LayerCache,
    Placement,
    PlanShape,
)
from vllm_di.components.kv_groups import group_layers
from vllm_di.components.messages import KvGroup, KvSpec
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import VllmDiError
from vllm_di.ports.hpu.attention import Decode, HpuAttention, Prompts
from vllm_di.ports.hpu.shapes import FlatShape

SIMULATED = ["platform=hpu", "device.simulated=true"]
SMALL = [
    "loader=dummy",
    "model.max_model_len=128",
    "kv_layout.block_size=16",
    "scheduler.max_num_seqs=4",
    "scheduler.max_num_batched_tokens=64",
    "limits.max_prefill_rows=2",
    "shapes.decode_seqs=[1,4]",
    "shapes.decode_blocks=[8]",
    "shapes.prefill_seqs=[2]",
    "shapes.prefill_queries=[16,64]",
    "shapes.context_blocks=[4]",
]
MUTANTS = {
    "PaddingInASequencesGroup": "not close",
    "WholeBlocksInUse": "not close",
    "PaddingInABlockInUse": "a block in use changed",
    "ContextForgotten": "not close",
    "PhasesMixed": "not close",
}
"""Attention with a flaw each, and what its death says."""
BLOCK = 16
BLOCKS = torch.tensor([[3, 1, 9], [5, 2, 8], [4, 7, 6]], dtype=torch.int32)


@contextmanager
def parts(*overrides: str, only: tuple[str, ...] = ("attention",)) -> Iterator[Any]:
    assembly = assemble([*SIMULATED, "model=tiny", *SMALL, *overrides])
    with opened(WorkerContainer, assembly, placement=Placement(), only=only) as container:
        yield container


def refused(run: Callable[[], Any], *words: str) -> None:
    with pytest.raises(VllmDiError) as caught:
        run()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(queries: list[int], past: list[int]) -> BatchPlan:
    """Sequences over the rows of BLOCKS, on the device."""
    lengths = [count + before for count, before in zip(queries, past, strict=True)]
    slots = [
        int(BLOCKS[row, at // BLOCK]) * BLOCK + at % BLOCK
        for row, (before, length) in enumerate(zip(past, lengths, strict=True))
        for at in range(before, length)
    ]
    plan = BatchPlan(
        token_ids=torch.zeros(len(slots), dtype=torch.int64),
        positions=torch.zeros(len(slots), dtype=torch.int64),
        query_start=torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=BLOCKS[: len(queries)],
        slot_mapping=torch.tensor(slots),
        logits_rows=torch.zeros(0, dtype=torch.int64),
        query_lens_host=queries,
        seq_lens_host=lengths,
    )
    values = {n: getattr(plan, n) for n in plan.__dataclass_fields__}
    moved = {n: v.to("hpu") for n, v in values.items() if isinstance(v, Tensor)}
    return BatchPlan(**values | moved)


def on_host(plan: BatchPlan) -> BatchPlan:
    values = {n: getattr(plan, n) for n in plan.__dataclass_fields__}
    return BatchPlan(**values | {n: v.cpu() for n, v in values.items() if isinstance(v, Tensor)})


def check_attention_equals_the_reference() -> None:
    equals_the_reference()


def equals_the_reference(*overrides: str) -> None:
    """Padded by the buckets, NaN in every slot that nobody wrote, the null block among them."""
    steps = [
        ([7, 33], [0, 0]),  # whole prompts, over a block's edge
        ([5, 9], [7, 33]),  # their next chunks
        ([3, 2], [12, 0]),  # a chunk beside a whole prompt
        ([1, 1, 1], [14, 42, 15]),  # decodes, one that fills its block
        ([1], [40]),
        ([1, 6], [31, 12]),  # a prompt's last token beside another's chunk
    ]
    with parts(*overrides, only=("attention", "kv_layout", "shapes")) as container:
        attention, layout, shapes = (
            container.attention(),
            container.kv_layout(),
            container.shapes(),
        )
        assert isinstance(attention, HpuAttention)
        for heads, kv_heads, size in ((4, 4, 16), (8, 2, 32), (4, 1, 24)):
            spec = AttentionSpec(heads, kv_heads, size, size**-0.5)
            attention.check(spec)
            kv = [KvSpec(layer=0, num_kv_heads=kv_heads, head_size=size)]
            ours = layout.allocate(kv, 10, torch.float32)[0]
            for cached in ours.tensors:
                cached.fill_(float("nan"))
            theirs = LayerCache(tuple(cached.cpu() for cached in ours.tensors))
            for number, (queries, past) in enumerate(steps):
                if number >= 2:  # as if the tokens between had been computed
                    for row, before in enumerate(past):
                        held = BLOCKS[row].repeat_interleave(BLOCK) * BLOCK
                        slots = (held + torch.arange(len(held)) % BLOCK)[:before]
                        for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
                            old = other.flatten(0, 1)
                            old[slots] = random(before, kv_heads, size, seed=row)
                            mine.copy_(other.to("hpu"))
                plan = batch(queries, past)
                padded = shapes.pad(plan)
                used, total = sum(queries), len(padded.token_ids)
                assert isinstance(padded.padded_to, FlatShape) and total >= used
                q, k, v = (
                    random(total, count, size, seed=seed)
                    for seed, count in enumerate((heads, kv_heads, kv_heads))
                )
                metadata = attention.build(padded)
                got = attention.forward(
                    q.to("hpu"), k.to("hpu"), v.to("hpu"), ours, metadata, spec
                ).cpu()
                reference = SdpaAttention(layout)
                wanted = reference.forward(
                    q[:used], k[:used], v[:used], theirs, on_host(plan), spec
                )
                torch.testing.assert_close(got[:used], wanted, rtol=1e-5, atol=2e-6)
                for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
                    same = mine.cpu().view(torch.int32) == other.view(torch.int32)
                    assert same[1:].all(), "a block in use changed"  # bit for bit


def check_padding_of_a_decode() -> None:
    with parts(only=("attention", "shapes")) as container:
        attention, shapes = container.attention(), container.shapes()
        plan = shapes.pad(batch([1, 1], [20, 3]))
        m = attention.build(plan)
        assert isinstance(m, Decode) and len(plan.token_ids) == 4
        assert m.block_list.tolist() == [3, 1, 5, 0, 0, 0, 0, 0]
        assert m.block_groups.tolist() == [0, 0, 1, 4, 4, 4, 4, 4]  # the number of sequences
        assert m.block_usage.tolist() == [16, 5, 4, 1, 1, 1, 1, 1]
        assert m.slots.tolist()[2:] == [0, 0]  # in the null block
        whole = attention.build(shapes.pad(batch([5, 2], [0, 0])))
        assert isinstance(whole, Prompts) and whole.past_blocks is None
        assert whole.lengths.tolist() == [5, 2]
        later = attention.build(shapes.pad(batch([5, 2], [1, 0])))
        assert later.past_blocks is not None and len(later.past_blocks) == 2 * 4


def check_one_sequences_nan_stays_its_own() -> None:
    with parts(only=("attention", "kv_layout", "shapes")) as container:
        attention, shapes = container.attention(), container.shapes()
        spec = AttentionSpec(4, 2, 16, 0.25)
        kv = [KvSpec(layer=0, num_kv_heads=2, head_size=16)]
        for queries, past in (([1, 1, 1], [20, 3, 17]), ([5, 3], [0, 0]), ([5, 3], [9, 20])):
            cache = container.kv_layout().allocate(kv, 10, torch.float32)[0]
            plan = shapes.pad(batch(queries, past))
            total = len(plan.token_ids)
            q, k, v = (random(total, n, 16, seed=n).to("hpu") for n in (4, 2, 2))
            for x in (q, k, v):
                x[: queries[0]] = float("nan")
            out = attention.forward(q, k, v, cache, attention.build(plan), spec).cpu()
            assert out[: queries[0]].isnan().all()
            assert out[queries[0] : sum(queries)].isfinite().all(), (queries, past)


def check_mutants_of_attention_die() -> None:
    for name, reason in MUTANTS.items():
        with pytest.raises(AssertionError, match=reason):
            equals_the_reference(*mutant("attention", name))


def check_every_step_was_warmed_up() -> None:
    every_step_was_warmed_up()


def check_a_bucket_left_out_is_noticed() -> None:
    with pytest.raises(AssertionError, match="decodes behind"):
        every_step_was_warmed_up(*mutant("shapes", "LargestBucketForgotten"))


def mutant(slot: str, name: str) -> list[str]:
    return [f"{slot}._target_=tests.ports.hpu.mutants.{name}", "trust=[tests]"]


def every_step_was_warmed_up(*overrides: str) -> None:
    """Each step that the scheduler may run has the shape of one that the warm-up ran."""
    with parts(*overrides, only=("shapes",)) as container:
        shapes = container.shapes()
        largest = PlanShape(tokens=64, rows=64, seqs=4, columns=8, queries=64)
        warm = {plan.padded_to for plan in shapes.warm_up_plans(largest, blank)}
        for seqs in (1, 2, 3):
            for length in (0, 15, 16, 47):
                found = shapes.pad(batch([1] * seqs, [length] * seqs)).padded_to
                assert found in warm, f"{seqs} decodes behind {length} tokens: {found}"
        rows = torch.arange(1, 33, dtype=torch.int32).view(4, 8)
        for length in (1, 127):
            plan = replace(batch([1], [0]), **four(rows, length))
            found = shapes.pad(plan).padded_to
            assert found in warm, f"4 decodes behind {length} tokens: {found}"
        for queries, past in (([1, 2], [0, 0]), ([16, 2], [0, 31]), ([32, 32], [0, 0])):
            found = shapes.pad(batch(queries, past)).padded_to
            assert found in warm, f"prompts of {queries} behind {past}: {found}"


def four(rows: Tensor, past: int) -> dict[str, Any]:
    """The fields of a step of four decodes."""
    ones = torch.ones(4, dtype=torch.int64)
    return {
        "token_ids": ones,
        "positions": ones * past,
        "query_start": torch.arange(5, dtype=torch.int32),
        "seq_lens": (ones * (past + 1)).int(),
        "block_table": rows,
        "slot_mapping": ones,
        "logits_rows": torch.arange(4),
        "query_lens_host": [1] * 4,
        "seq_lens_host": [past + 1] * 4,
    }


def blank(shape: PlanShape) -> BatchPlan:
    assert shape == PlanShape(1, 1, 1, 1, 1)
    return on_host(batch([1], [0]))


def check_what_it_lacks_is_refused() -> None:
    with parts() as container:
        check = container.attention().check
        refused(lambda: check(AttentionSpec(8, 8, 64, 1.0, window=32)), "sliding window", "sdpa")
        refused(lambda: check(AttentionSpec(8, 8, 64, 1.0, soft_cap=30.0)), "soft cap")


def check_bad_config_is_refused() -> None:
    for overrides, words in (
        (["kv_layout=hnd"], ("kv_layout=nhd", "attention")),
        (["limits.mixed_steps=true"], ("limits.mixed_steps=false",)),
        (["limits.null_block=false"], ("limits.null_block=true",)),
        (["limits.drafts=true"], ("limits.drafts=false",)),
        (["model.dtype=float16"], ("float16", "bfloat16, float32")),
        (["graph=hpu_compile", "device.lazy=true"], ("device.lazy=false", "graph=hpu_lazy")),
        (["graph=hpu_lazy"], ("device.lazy=true", "graph=hpu_compile")),
        (["graph=hpu_compile", "graph.backend=hpu_bakend"], ("no backend 'hpu_bakend'",)),
        (["shapes.decode_seqs=[1,2]"], ("decode_seqs", "add 4", "scheduler.max_num_seqs")),
        (["limits.max_prefill_rows=3"], ("prefill_seqs", "limits.max_prefill_rows=2")),
        (
            ["shapes.prefill_queries=[16,32]"],
            ("prefill_queries", "add 64", "scheduler.max_num_batched_tokens"),
        ),
    ):

        def run(overrides: list[str] = overrides) -> None:
            with parts(*overrides, only=()):
                pass

        refused(run, *words)


def answers(*overrides: str) -> list[list[int]]:
    prompts = [[1, 2, 3, 4, 5], list(range(3, 80)), [9], [7, 7, 7]]
    with LLM("tiny", overrides=[*SMALL, *overrides]) as llm:
        outputs = llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        )
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_an_engine_gives_the_hosts_tokens() -> None:
    """With the port's attention and with those that a user chose instead, and with each graph
    policy. A prompt longer than the largest bucket runs in chunks."""
    shape = [o for o in SMALL if not o.startswith("shapes.")]
    host: dict[str, list[list[int]]] = {}
    for dtype in ("float32", "bfloat16"):
        prompts = [[1, 2, 3, 4, 5], list(range(3, 80)), [9], [7, 7, 7]]
        base = ["platform=cpu", "ops=torch", *shape, f"model.dtype={dtype}"]
        with LLM("tiny", overrides=base) as llm:
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            outputs = llm.generate(prompts, params)
        host[dtype] = [list(output.outputs[0].token_ids) for output in outputs]
    for dtype, choice in (
        ("float32", []),
        ("bfloat16", []),
        ("float32", ["attention=sdpa"]),
        ("float32", ["graph=hpu_lazy", "device.lazy=true"]),
        ("float32", ["graph=hpu_compile"]),
    ):
        found = answers(*SIMULATED, f"model.dtype={dtype}", *choice)
        assert found == host[dtype], (dtype, choice)
        package: Any = sys.modules["habana_frameworks"]
        assert (package.steps > 0) is ("graph=hpu_lazy" in choice)
        assert bool(package.graphs) is ("graph=hpu_compile" in choice)


def check_the_cache_gets_what_the_graphs_left() -> None:
    """A graph of each bucket takes memory before the cache is sized, as much as it takes after."""
    sized: list[int] = []
    fraction = 0.5
    for graph_memory in (0, 0, 1 << 20):
        # the largest bucket of each kind alone: torch takes a second or two to trace each
        choice = ["graph=hpu_compile", f"device.simulation.graph_memory={graph_memory}"]
        choice += ["shapes.decode_seqs=[4]", "shapes.prefill_queries=[64]"]
        limit = ["device.simulation.memory=48MiB", f"worker.memory_fraction={fraction}"]
        with parts(*choice, *limit, "model.dtype=float32", only=("worker", "device")) as container:
            worker = container.worker()
            size = worker.prepare(worker_groups(worker))
            package: Any = sys.modules["habana_frameworks"]
            tried = len(package.graphs)
            # so that 25 blocks fit where graphs take nothing
            fraction = 25.5 * size.bytes_per_block / (48 << 20)
            worker.allocate(size.num_blocks)
            assert tried and len(package.graphs) == 2 * tried
            sized.append(size.num_blocks)
    assert 9 < sized[2] < sized[1] < sized[0] == 33, sized


def worker_groups(worker: Any) -> list[KvGroup]:
    return group_layers([worker.load().kv_specs])


def check_smollm2_says_paris() -> None:
    overrides = [*SIMULATED, "model.dtype=float32", "model.max_model_len=128", *SMALL[2:]]
    with LLM("smollm2", overrides=overrides) as llm:
        output = llm.generate(
            ["The capital of France is"], SamplingParams(temperature=0, max_tokens=2)
        )[0]
    assert re.search("Paris", output.outputs[0].text)
