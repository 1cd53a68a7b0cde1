"""benchmarks/gpu.py, piece by piece, on the host with tiny shapes: it is written for machines that
the other tests do not have."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu

TINY = gpu.Plan(
    overrides=(
        *("platform=cpu", "device.threads=1", "model=tiny", "model.max_model_len=128"),
        *("ops=torch", "graph=eager", "worker.num_blocks=64"),
    ),
    device="cpu",
    decodes=((1, 8), (3, 8)),
    prefill=(2, 16),
    steps=4,
    runs=1,
    bandwidth_bytes=2**20,
    matrix_size=64,
)
LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
}


def test_what_a_step_of_llama3_8b_moves() -> None:
    shape = gpu.Shape.of(LLAMA3_8B)
    # 8.03 billion weights, 0.53 of them in the embedding, of which rows alone are read
    assert shape.weight_bytes == pytest.approx(2 * (8.03e9 - 0.525e9), rel=1e-3)
    assert shape.kv_bytes == 131072
    assert shape.decode_bytes(64, 1024) - shape.weight_bytes == 64 * 1024 * 131072
    # two operations a weight and token, and a few percent for attention
    products = 2 * 6.98e9 * 8 * 2048
    assert 1.02 * products < shape.prefill_flops(8, 2048) < 1.06 * products


def test_the_whole_run_on_the_host(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status = gpu.main(["--no-tests", "--json", str(tmp_path / "gpu.json")], TINY)
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    for who in ("vllm-di", "transformers"):
        for name in ("decode, batch 1", "decode, batch 3", "prefill 2 x 16"):
            assert rows[f"{name}: {who}"]["value"] > 0
    assert rows["memory bandwidth"]["value"] > 0 and rows["bf16 matrix rate"]["value"] > 0
    aims = {name: row["target"] for name, row in rows.items() if row["target"]}
    assert aims == {
        "decode, batch 1: vllm-di, of bandwidth": 0.85,
        "prefill 2 x 16: vllm-di, of matrix rate": 0.7,
    }
    missed = any(rows[name]["value"] < aim for name, aim in aims.items())
    assert status == int(missed)
    assert found["machine"]["torch"] == torch.__version__
    assert "decode, batch 1: vllm-di" in capsys.readouterr().out


def test_failing_tests_and_missed_targets_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    statuses = gpu.run_tests(
        {"good": [sys.executable, "-c", ""], "bad": [sys.executable, "-c", "raise SystemExit(3)"]}
    )
    assert statuses == {"good": 0, "bad": 3}
    rows = [gpu.Row("a", 0.8, "", 0.85), gpu.Row("b", 0.9, "", 0.85), gpu.Row("c", 1.0, "GB/s")]
    assert [row.verdict for row in rows] == ["missed (0.85)", "reached (0.85)", ""]
    gpu.show(rows, statuses, {"device": "none"}, None)
    out = capsys.readouterr().out
    assert "tests: bad" in out and "failed" in out and "missed (0.85)" in out


def test_the_commands_name_what_exists() -> None:
    for command in gpu.TESTS.values():
        for word in command:
            assert (
                not word.startswith("tests/")
                or Path(gpu.__file__).parents[1].joinpath(word).exists()
            )


def test_the_default_plan_is_the_real_thing() -> None:
    plan = dataclasses.asdict(gpu.Plan())
    assert plan["device"] == "cuda" and "model=llama3" in plan["overrides"]
    assert plan["decodes"] == ((1, 1024), (64, 1024)) and plan["prefill"] == (8, 2048)
