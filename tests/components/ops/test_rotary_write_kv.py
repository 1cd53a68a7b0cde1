"""Rotary embedding and the cache write in one: the numbers of both one after the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from tests.components.ops.libraries import (
    DTYPES,
    ISAS,
    REFERENCE,
    close,
    library,
    noted_calls,
    random,
)
from torch import Tensor

from vllm_di import LLM, SamplingParams
from vllm_di.components.attention.hybrid import HybridAttention
from vllm_di.components.attention.paged import PagedAttention
from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import OpTable
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain

TINY = ["platform=cpu", "model.dtype=float32"]
MEMBERS = ("rotary_embedding", "write_kv")
BLOCKS, BLOCK_SIZE = 5, 4
every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


class Call(NamedTuple):
    """Arguments of one call, with tensors that no other call has."""

    positions: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    cos_sin: Tensor
    interleaved: bool
    key_cache: Tensor
    value_cache: Tensor
    slot_mapping: Tensor

    def tokens(self, rows: slice) -> Call:
        return self._replace(
            positions=self.positions[rows],
            q=self.q[rows].clone(),
            k=self.k[rows].clone(),
            v=self.v[rows].clone(),
            key_cache=self.key_cache.clone(),
            value_cache=self.value_cache.clone(),
            slot_mapping=self.slot_mapping[rows],
        )

    def wide(self) -> Call:
        """In fp32."""
        own = self.tokens(slice(None))
        return own._replace(
            q=own.q.float(),
            k=own.k.float(),
            v=own.v.float(),
            key_cache=own.key_cache.float(),
            value_cache=own.value_cache.float(),
        )


def call(
    tokens: int,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_size: int = 64,
    rotary: int = 64,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """q, k and v are views of one product, as in a model; every third token is dropped."""
    qkv = random(tokens, (heads + 2 * kv_heads) * head_size, dtype=dtype)
    sizes = [heads * head_size, kv_heads * head_size, kv_heads * head_size]
    q, k, v = (x.unflatten(1, (-1, head_size)) for x in qkv.split(sizes, 1))
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=torch.Generator().manual_seed(1))[:tokens]
    slots[2::3] = -1
    keys, values = (
        random(BLOCKS, kv_heads, BLOCK_SIZE, head_size, dtype=dtype, seed=seed) for seed in (7, 8)
    )
    positions = torch.arange(tokens) * 3
    return Call(positions, q, k, v, random(64, rotary), interleaved, keys, values, slots)


def apart(ops: OpTable, one: Call) -> Tensor:
    q, k = ops.rotary_embedding(one.positions, one.q, one.k, one.cos_sin, one.interleaved)
    ops.write_kv(k, one.v, one.key_cache, one.value_cache, one.slot_mapping)
    return q


@every_isa
@every_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("head_size", "rotary"), [(64, 64), (80, 32), (96, 96), (128, 128), (256, 64), (6, 6), (7, 4)]
)
def test_rotary_write_kv(
    isa: str,
    dtype: torch.dtype,
    interleaved: bool,
    heads: tuple[int, int],
    head_size: int,
    rotary: int,
) -> None:
    """Near the reference, and bit-equal to the library's own two ops."""
    ops = library(isa)
    for tokens in (0, 1, 7, 20):
        one = call(
            tokens,
            heads=heads[0],
            kv_heads=heads[1],
            head_size=head_size,
            rotary=rotary,
            interleaved=interleaved,
            dtype=dtype,
        )
        exact, two = one.wide(), one.tokens(slice(None))
        want = REFERENCE.rotary_write_kv(*exact)
        twice = apart(ops, two)
        got = ops.rotary_write_kv(*one)
        close(got, want)
        close(one.key_cache, exact.key_cache)
        assert torch.equal(one.value_cache.float(), exact.value_cache)
        assert torch.equal(got, twice)
        assert torch.equal(one.key_cache, two.key_cache)


@every_isa
@every_dtype
def test_a_token_does_not_depend_on_those_beside_it(isa: str, dtype: torch.dtype) -> None:
    ops, all_tokens = library(isa), call(20, head_size=80, rotary=48, dtype=dtype)
    whole = all_tokens.tokens(slice(None))
    q = ops.rotary_write_kv(*whole)
    for rows in (slice(0, 1), slice(3, 5), slice(4, 20)):
        part = all_tokens.tokens(rows)
        assert torch.equal(ops.rotary_write_kv(*part), q[rows])
        for slot in part.slot_mapping[part.slot_mapping >= 0].tolist():
            block, offset = divmod(slot, BLOCK_SIZE)
            for mine, theirs in (
                (part.key_cache, whole.key_cache),
                (part.value_cache, whole.value_cache),
            ):
                assert torch.equal(mine[block, :, offset], theirs[block, :, offset])


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cache_that_the_kernel_cannot_take_is_written_by_the_two(
    cache_dtype: torch.dtype,
) -> None:
    one = call(7)
    one = one._replace(
        key_cache=one.key_cache.to(cache_dtype), value_cache=one.value_cache.to(cache_dtype)
    )
    two = one.tokens(slice(None))
    want = REFERENCE.rotary_write_kv(*two)
    torch.testing.assert_close(library(ISAS[0]).rotary_write_kv(*one), want)
    torch.testing.assert_close(one.key_cache, two.key_cache)
    assert torch.equal(one.value_cache, two.value_cache)


@every_dtype
def test_a_replay_reads_its_inputs_anew(dtype: torch.dtype) -> None:
    ops, one = library(ISAS[0]), call(7, dtype=dtype)
    recorder = ops.recorder()
    assert recorder is not None
    result, replay, reason = recorder.record(lambda: ops.rotary_write_kv(*one))
    assert replay is not None, reason
    for seed in (1, 2):
        for x in (one.q, one.k, one.v):
            x.copy_(random(*x.shape, dtype=dtype, seed=seed))
        one.positions.add_(seed)
        two = one.tokens(slice(None))
        replay()
        assert torch.equal(result, apart(ops, two))
        assert torch.equal(one.key_cache, two.key_cache)
        assert torch.equal(one.value_cache, two.value_cache)


# -- fusion never wins over a choice ------------------------------------------------------------


def layout() -> HndLayout:
    on = HostDevice(threads=2, memory_budget=None, default_dtype="float32")
    return HndLayout(on, block_size=16, dtype="auto")


class OwnForward(PagedAttention):
    """Sees what goes into its attention."""

    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args)


def test_attention_rotates_where_nobody_chose_otherwise() -> None:
    on, table = layout(), SelectedOps(library(ISAS[0]))
    paged = PagedAttention(table, on)
    assert paged.unrotated() is not None
    assert OwnForward(table, on).unrotated() is None
    assert SdpaAttention(on).unrotated() is None
    assert HybridAttention(on, prefill=paged, decode=paged).unrotated() is None
    for member in MEMBERS:
        chosen: dict[str, Any] = {member: TorchOps()}
        assert PagedAttention(SelectedOps(library(ISAS[0]), **chosen), on).unrotated() is None


def test_a_library_without_it_has_its_two_ops() -> None:
    class Two(TorchOps):
        implements = frozenset(MEMBERS)

    table = SelectedOps(Two())
    assert "rotary_write_kv" not in table.fusions
    one, two = call(7), call(7)
    assert torch.equal(table.rotary_write_kv(*one), REFERENCE.rotary_write_kv(*two))
    assert torch.equal(one.key_cache, two.key_cache)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(library, op) of every call of the three ops."""
    return noted_calls(monkeypatch, (*MEMBERS, "rotary_write_kv"))


def tokens(*overrides: str) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM("tiny", overrides=[*TINY, *overrides]) as llm:
        outputs = llm.generate(["a", "hello world", "x" * 40], params)
        return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("override", "calls"),
    [
        (
            "ops.rotary_embedding=torch",
            {("TorchOps", "rotary_embedding"), ("CpuOps", "write_kv")},
        ),
        ("ops.write_kv=torch", {("CpuOps", "rotary_embedding"), ("TorchOps", "write_kv")}),
        ("attention=sdpa", {("CpuOps", "rotary_embedding")}),
    ],
)
def test_an_override_sees_the_unfused_path_run(
    override: str, calls: set[tuple[str, str]], seen: set[tuple[str, str]]
) -> None:
    fused = tokens()
    assert seen == {("CpuOps", "rotary_write_kv")}
    seen.clear()
    assert tokens(override) == fused
    assert seen == calls


def test_explain_lists_the_fusion() -> None:
    assert "rotary_write_kv" in explain(assemble([*TINY, "model=tiny"])).fusions
    for member in MEMBERS:
        found = explain(assemble([*TINY, "model=tiny", f"ops.{member}=torch"]))
        assert "rotary_write_kv" not in found.fusions
        [row] = [row for row in found.ops if row.op == "rotary_write_kv"]
        assert row.runs_on == f"unfused: {member} runs on another library"
