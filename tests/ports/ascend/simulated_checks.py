"""The port on a simulated NPU. Run in a process of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_di import LLM, SamplingParams
from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.interfaces import AttentionSpec, BatchPlan, LayerCache, Placement
from vllm_di.components.messages import KvSpec
from vllm_di.components.ops.torch import TorchOps
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError, PortError
from vllm_di.ports.ascend.attention import AscendAttention
from vllm_di.ports.ascend.ops import AscendOps

SIMULATED = ["platform=ascend", "device.simulated=true"]
BOUNDS = {torch.bfloat16: (1.6e-2, 1e-3), torch.float16: (1e-3, 1e-3)}
"""Relative and absolute, as in the conformance suite."""


@contextmanager
def parts(*overrides: str, only: tuple[str, ...] = ("attention",)) -> Iterator[Any]:
    assembly = assemble([*SIMULATED, "model=tiny", "loader=dummy", *overrides])
    with opened(WorkerContainer, assembly, placement=Placement(), only=only) as container:
        yield container


def refused(run: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def close(ours: Tensor, theirs: Tensor) -> None:
    relative, absolute = BOUNDS[theirs.dtype]
    torch.testing.assert_close(ours.cpu(), theirs, rtol=relative, atol=absolute)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_ops_equal_the_reference() -> None:
    with parts(only=("ops", "device")) as container:
        ops, reference = AscendOps(container.device()), TorchOps()
        for dtype in BOUNDS:
            x, y, weight = (random(9, 64, dtype=dtype, seed=s) for s in range(3))
            ours = [t.to("npu") for t in (x, y)]
            w = weight[0]
            close(ops.rms_norm(ours[0], w.to("npu"), 1e-5), reference.rms_norm(x, w, 1e-5))
            for got, wanted in zip(
                ops.add_rms_norm(ours[0], ours[1], w.to("npu"), 1e-5),
                reference.add_rms_norm(x, y, w, 1e-5),
                strict=True,
            ):
                close(got, wanted)
            close(ops.silu_and_mul(ours[0]), reference.silu_and_mul(x))
            close(ops.gelu_tanh_and_mul(ours[0]), reference.gelu_tanh_and_mul(x))
            qkv = random(9, 6 * 32, dtype=dtype)  # views, as the model makes them
            q, k = (part.view(9, -1, 32) for part in qkv.split([4 * 32, 2 * 32], -1))
            for size, interleaved in product((16, 20, 32), (False, True)):
                at, table = torch.arange(9), torch.randn(16, size)  # a part of a head turns
                npu_at, npu_table, npu_q, npu_k = (t.to("npu") for t in (at, table, q, k))
                other = reference.rotary_embedding(at, q, k, table, interleaved)
                mine = ops.rotary_embedding(npu_at, npu_q, npu_k, npu_table, interleaved)
                close(mine[0], other[0])
                close(mine[1], other[1])


def batch(queries: list[int], past: list[int], blocks: Tensor, padding: int = 0) -> BatchPlan:
    """Sequences over the rows of ``blocks`` [seqs, max_blocks], on the host."""
    lengths = [count + before for count, before in zip(queries, past, strict=True)]
    slots = [
        int(blocks[row, at // 128]) * 128 + at % 128
        for row, (before, length) in enumerate(zip(past, lengths, strict=True))
        for at in range(before, length)
    ]
    total = sum(queries) + padding
    return BatchPlan(
        token_ids=torch.zeros(total, dtype=torch.int64),
        positions=torch.zeros(total, dtype=torch.int64),
        query_start=torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=blocks,
        slot_mapping=torch.tensor([*slots, *[-1] * padding]),
        logits_rows=torch.zeros(0, dtype=torch.int64),
        query_lens_host=queries,
        seq_lens_host=lengths,
    )


def on_device(plan: BatchPlan) -> BatchPlan:
    names = [n for n in plan.__dataclass_fields__ if isinstance(getattr(plan, n), Tensor)]
    values = {n: getattr(plan, n) for n in plan.__dataclass_fields__}
    return BatchPlan(**values | {n: values[n].to("npu") for n in names})


def check_attention_equals_the_reference() -> None:
    blocks = torch.tensor([[3, 1], [5, 2], [4, 7], [6, 8]], dtype=torch.int32)
    steps = [
        ([7, 130, 1, 20], [0, 0, 0, 0]),  # prefills, one of a single token
        ([5, 1, 1, 3], [7, 130, 1, 20]),  # chunks and decodes mixed, over a block's edge
        ([1, 1, 1, 1], [127, 131, 128, 23]),  # decodes at the edge
    ]
    with parts(only=("attention", "kv_layout")) as container:
        attention, layout = container.attention(), container.kv_layout()
        assert isinstance(attention, AscendAttention)
        for head_size, heads, kv_heads in ((64, 4, 4), (128, 8, 2), (80, 4, 1), (192, 2, 2)):
            spec = AttentionSpec(heads, kv_heads, head_size, head_size**-0.5)
            attention.check(spec)
            kv = [KvSpec(layer=0, num_kv_heads=kv_heads, head_size=head_size)]
            ours = layout.allocate(kv, 10, torch.bfloat16)[0]
            ours.key.fill_(float("nan"))  # what nobody wrote must not show
            ours.value.fill_(float("nan"))
            theirs = LayerCache((ours.key.cpu(), ours.value.cpu()))
            reference = SdpaAttention(layout)
            for past_step, (queries, past) in enumerate(steps):
                if past_step == 2:  # as if the tokens between had been computed
                    for cached in (ours.key, ours.value, theirs.key, theirs.value):
                        cached.nan_to_num_(0.5)
                plan = batch(queries, past, blocks, padding=past_step)
                total = len(plan.token_ids)
                q = random(total, heads, head_size, dtype=torch.bfloat16)
                k, v = (
                    random(total, kv_heads, head_size, dtype=torch.bfloat16, seed=s) for s in (1, 2)
                )
                got = attention.forward(
                    q.to("npu"),
                    k.to("npu"),
                    v.to("npu"),
                    ours,
                    attention.build(on_device(plan)),
                    spec,
                )
                wanted = reference.forward(q, k, v, theirs, plan, spec)
                used = sum(queries)
                close(got[:used], wanted[:used])
                for mine, other in ((ours.key, theirs.key), (ours.value, theirs.value)):
                    same = mine.cpu().view(torch.int16) == other.view(torch.int16)
                    assert same.all()  # bit for bit, and no slot but the addressed ones


def check_what_the_kernels_lack_is_refused() -> None:
    with parts() as container:
        check = container.attention().check
        refused(lambda: check(AttentionSpec(8, 8, 72, 1.0)), "multiples of 16", "attention=sdpa")
        refused(lambda: check(AttentionSpec(8, 8, 512, 1.0)), "up to 256")
        refused(lambda: check(AttentionSpec(8, 8, 64, 1.0, window=32)), "sliding window")
        refused(lambda: check(AttentionSpec(8, 8, 64, 1.0, soft_cap=30.0)), "soft cap")
        refused(lambda: check(AttentionSpec(128, 1, 64, 1.0)), "128 heads that share")


def check_bad_config_is_refused() -> None:
    for overrides, words in (
        (["kv_layout=hnd"], ("kv_layout=nhd", "attention")),
        (
            ["kv_layout.block_size=64"],
            ("kv_layout.block_size", "384, 512 tokens, not 64"),
        ),
        (["model.dtype=float32"], ("float32", "bfloat16, float16")),
        (["graph=ascend"], ("limits.null_block=true",)),
        (["graph=ascend", "limits.null_block=true"], ("NPUGraph", "graph=eager")),
        (["graph=ascend", "attention=sdpa"], ("SdpaAttention", "graph=eager")),
        (["ops.rms_norm=ascend", "ops=torch", "ops.linear=ascend"], ("does not implement",)),
    ):

        def run(overrides: list[str] = overrides) -> None:
            with parts(*overrides, only=()):
                pass

        refused(run, *words)
    other = ["loader=dummy", "model.max_model_len=512", "kv_layout.dtype=float16"]
    refused(lambda: answers(*SIMULATED, *other), "kv_layout.dtype", "leave it auto")


def answers(*overrides: str, model: str = "tiny") -> list[list[int]]:
    prompts = [[1, 2, 3, 4, 5], list(range(3, 140)), [9]]
    with LLM(model, overrides=list(overrides)) as llm:
        outputs = llm.generate(
            prompts,
            SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
        )
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_an_engine_gives_the_hosts_tokens() -> None:
    """In bfloat16 and fp16, with the port's kernels and with those that a user chose instead."""
    for dtype in ("bfloat16", "float16"):
        base = ["loader=dummy", f"model.dtype={dtype}", "model.max_model_len=512"]
        host = answers("platform=cpu", "ops=torch", *base)
        for choice in (
            [],
            ["attention=sdpa"],
            ["ops=torch"],
            ["ops.rms_norm=torch", "ops.rotary_embedding=torch"],
            ["attention=paged", "kv_layout=hnd"],
            ["quantization=ascend_nz"],
        ):
            assert answers(*SIMULATED, *base, *choice) == host, (dtype, choice)


def check_choices_are_honoured() -> None:
    with parts("attention=sdpa", "ops.rms_norm=torch", only=("attention", "ops")) as container:
        assert isinstance(container.attention(), SdpaAttention)
        ops = container.ops()
        assert ops.describe()["rms_norm"] == "torch"
        assert ops.describe()["silu_and_mul"] == "npu (torch-npu)"
        assert "add_rms_norm" not in ops.fusions


def check_smollm2_says_paris() -> None:
    with LLM("smollm2", overrides=SIMULATED) as llm:
        output = llm.generate(
            ["The capital of France is"], SamplingParams(temperature=0, max_tokens=2)
        )[0]
    assert re.search("Paris", output.outputs[0].text)


def check_out_of_memory_is_said_at_the_start() -> None:
    with pytest.raises(PortError, match=r"attention: .* the simulated device is out of memory"):
        answers(*SIMULATED, "loader=dummy", "device.simulation.memory=64KiB")
