"""Rows of a packed head are what the table holds, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.components.ops.libraries import DTYPES, ISAS, REFERENCE, library, random
from torch import Tensor

from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.quantized import by_channel, by_group

every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
VOCAB = 83  # the last panel is not full
TOKENS = [[], [82], [0, 15, 16, 31, 32, 47, 48, 79, 80, 82, 0], [i * 7 % VOCAB for i in range(300)]]


def check(embed: Any, table: Tensor) -> None:
    assert embed is not None
    for tokens in TOKENS:
        token_ids = torch.tensor(tokens, dtype=torch.int64)
        got = embed(token_ids)
        assert got.dtype is table.dtype
        assert torch.equal(got, REFERENCE.embedding(token_ids, table))


@every_isa
@every_dtype
@pytest.mark.parametrize("hidden", [2, 64, 102])
def test_rows_of_a_packed_weight(isa: str, dtype: torch.dtype, hidden: int) -> None:
    ops, table = library(isa), random(VOCAB, hidden, dtype=dtype)
    check(ops.packed_embedding(ops.pack_linear(table), dtype), table)


@every_isa
@every_dtype
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_a_weight_in_groups(isa: str, dtype: torch.dtype, bits: int) -> None:
    ops, weight = library(isa), by_group(random(VOCAB, 96), bits)
    check(ops.packed_embedding(ops.pack_quantized(weight), dtype), weight.dequantize(dtype))


def test_what_cannot_be_read_keeps_its_table() -> None:
    ops, weight = library(ISAS[0]), random(64, 64)
    packed = ops.pack_linear(weight)
    groups = ops.pack_quantized(by_group(weight, 8))
    for unread, dtype in (
        (weight, torch.float32),
        (packed, torch.bfloat16),
        (groups, torch.float16),
        (ops.pack_quantized(by_channel(weight)), torch.float32),
        (ops.pack_gated_linear(weight), torch.float32),
        (ops.pack_gated_quantized(by_group(weight, 8)), torch.float32),
    ):
        assert ops.packed_embedding(unread, dtype) is None
    assert TorchOps().packed_embedding(packed, torch.float32) is None


def test_it_is_asked_of_the_library_that_embeds() -> None:
    ops, weight = library(ISAS[0]), random(64, 64)
    packed = ops.pack_linear(weight)
    assert SelectedOps(ops).packed_embedding(packed, torch.float32) is not None
    chosen = SelectedOps(ops, embedding=TorchOps())
    assert chosen.packed_embedding(packed, torch.float32) is None


@pytest.mark.parametrize("rows", [1, 64])
def test_a_replay_reads_other_tokens(rows: int) -> None:
    ops, table = library(ISAS[0]), random(VOCAB, 512, dtype=torch.bfloat16)
    embed = ops.packed_embedding(ops.pack_linear(table), table.dtype)
    recorder = ops.recorder()
    assert embed is not None and recorder is not None
    token_ids = torch.zeros(rows, dtype=torch.int64)
    out, replay, reason = recorder.record(lambda: embed(token_ids))
    assert replay is not None, reason
    token_ids.copy_(torch.arange(rows) + 5)
    replay()
    assert torch.equal(out, table[token_ids])
