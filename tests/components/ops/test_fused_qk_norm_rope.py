"""Norms of queries and keys and their rotary embedding in one: whoever has it is called by models
with such norms, and what it stands for runs elsewhere."""

from __future__ import annotations

import pytest
import torch
from tests.components.ops.libraries import noted_calls, random

from vllm_di import LLM, SamplingParams
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.models.rope import cos_sin_table

NORMED = ["platform=cpu", "model.dtype=float32", "model.qk_norm=true", "loader=dummy"]
OPS = ("fused_qk_norm_rope", "rms_norm", "rotary_embedding", "rotary_write_kv")


def test_the_reference_is_each_head_on_its_own() -> None:
    """By the formula, head by head: queries by their weight, keys by theirs, values left alone."""
    heads, kv_heads, size, eps = 4, 2, 8, 1e-3
    table = cos_sin_table(
        theta=100.0, scaling=None, rotary_dim=4, num_positions=9, max_position_embeddings=9
    )
    qkv, weights = random(3, 8 * size), (random(size, seed=1), random(size, seed=2))
    positions = torch.tensor([5, 0, 8], dtype=torch.int64)
    given = qkv.clone()
    q, k = TorchOps().fused_qk_norm_rope(
        positions, given, heads, kv_heads, *weights, eps, table, False
    )
    assert torch.equal(given[:, 6 * size :], qkv[:, 6 * size :])
    for token, position in enumerate(positions.tolist()):
        for head in range(heads + kv_heads):
            x = qkv[token, head * size : (head + 1) * size]
            weight = weights[0] if head < heads else weights[1]
            x = x / (x.square().mean() + eps).sqrt() * weight
            cos, sin = table[position, :2], table[position, 2:]
            a, b = x[:2], x[2:4]
            want = torch.cat([a * cos - b * sin, b * cos + a * sin, x[4:]])
            got = q[token, head] if head < heads else k[token, head - heads]
            torch.testing.assert_close(got, want)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(library, op) of every call of these ops that the table makes."""
    return noted_calls(monkeypatch, OPS)


def tokens(*overrides: str) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM("tiny", overrides=[*NORMED, *overrides]) as llm:
        outputs = llm.generate(["a", "hello world", "x" * 40], params)
        return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        (["ops=torch"], True),
        (["ops=torch", "attention=sdpa"], True),
        (["ops=cpu", "ops.fused_qk_norm_rope=torch"], True),
        (["ops=cpu"], False),
        (["ops=torch", "ops.rms_norm=cpu"], False),
        (["ops=torch", "ops.rotary_write_kv=cpu"], False),
        (["ops=torch", "model.qk_norm=false"], False),
    ],
)
def test_a_model_calls_it_where_it_is_in_force(
    overrides: list[str], fused: bool, seen: set[tuple[str, str]]
) -> None:
    found = tokens(*overrides)
    assert (("TorchOps", "fused_qk_norm_rope") in seen) == fused
    assert not fused or {op for _, op in seen} <= {*OPS} - {"rotary_write_kv"}
    if "model.qk_norm=false" not in overrides:
        assert found == tokens("ops=cpu", "attention=sdpa", "ops.rms_norm=torch")


def test_beside_a_library_that_lacks_it_its_two_ops_run_there() -> None:
    class Two(TorchOps):
        implements = frozenset({"rms_norm", "rotary_embedding"})

    table = SelectedOps(Two())
    assert "fused_qk_norm_rope" not in table.fusions
    row = table.describe()["fused_qk_norm_rope"]
    assert row == "unfused: rms_norm, rotary_embedding in turn"


def test_another_fused_op_that_was_chosen_is_not_passed_over() -> None:
    table = SelectedOps(TorchOps(), rotary_write_kv=TorchOps())
    assert "fused_qk_norm_rope" not in table.fusions and "rotary_write_kv" in table.fusions
    assert table.describe()["fused_qk_norm_rope"] == "unfused: rotary_write_kv was chosen"
    both = SelectedOps(TorchOps(), rotary_write_kv=TorchOps(), fused_qk_norm_rope=TorchOps())
    assert {"fused_qk_norm_rope", "rotary_write_kv"} <= {*both.fusions}
