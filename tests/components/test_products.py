"""Torch's products never meet a narrow view with gaps between its rows, which oneDNN reads on CPUs
with AMX. What differs from one make of CPU to another is asked for here, on any."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.components.gaps import GapsRefused, has_gaps, judged

import vllm_di
from vllm_di.components import products
from vllm_di.conformance.op_cases import with_gaps

ROOT = Path(__file__).parents[2]
SOURCES = Path(vllm_di.__file__).parent
FOLDERS = ("components", "ports", "models")
APART = ("components/products.py",)
CALLS = frozenset(
    {
        *("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "mv", "addmv", "einsum", "inner"),
        *("scaled_dot_product_attention", "bilinear", "tensordot", "chain_matmul", "multi_dot"),
    }
)
CPU_SETTINGS = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "all": {"ONEDNN_MAX_CPU_ISA": "ALL"},
}
"""What oneDNN and torch may use of this CPU: ALL is AMX where there is any."""


def offences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, a product that is torch's own)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            yield node.lineno, ast.unparse(node)
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = ast.unparse(node.func.value)
        if node.func.attr in CALLS and owner in ("torch", "F", "torch.nn.functional", "nn"):
            yield node.lineno, ast.unparse(node)


def test_all_products_of_torch_are_called_in_one_place() -> None:
    found = []
    for path in (p for folder in FOLDERS for p in sorted((SOURCES / folder).rglob("*.py"))):
        name = path.relative_to(SOURCES).as_posix()
        if name not in APART:
            found += [f"{name}:{n}: {call}" for n, call in offences(ast.parse(path.read_text()))]
    assert not found, "\n".join(found)
    assert list(offences(ast.parse((SOURCES / APART[0]).read_text())))


@pytest.mark.parametrize(
    "overrides",
    [
        ["platform=cpu"],
        ["platform=cpu", "ops=torch", "attention=sdpa"],
        ["platform=cpu", "ops.library.rows_for_onednn=1"],
        ["platform=openvino"],
    ],
    ids=" ".join,
)
def test_no_product_meets_gaps(overrides: list[str]) -> None:
    report = judged(*overrides)
    assert not report.failed, report.failed[0].message


def test_without_the_copy_the_suite_meets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "dense", lambda x: x)
    failed = {case.id for case in judged("platform=cpu", "ops=torch", "attention=sdpa").failed}
    assert {f"ops/test_op[linear-{dtype}]" for dtype in ("bfloat16", "float16")} <= failed
    assert "ops/test_op[gated_linear-bfloat16]" in failed
    assert "decode/test_mixed[bfloat16]" in failed


def in_a_process(*overrides: str, **settings: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.components.gaps", *overrides],
        cwd=ROOT,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **settings},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("setting", CPU_SETTINGS)
def test_no_product_meets_gaps_on_other_instruction_sets(setting: str) -> None:
    in_a_process("platform=cpu", "ops=torch", "attention=sdpa", **CPU_SETTINGS[setting])


def test_no_product_meets_gaps_on_a_simulated_device() -> None:
    in_a_process("platform=ascend", "device.simulated=true")


def test_a_product_of_a_view_is_that_of_its_copy() -> None:
    """The shapes of the fault: 17 rows or more, inputs that are no multiple of 32."""
    for rows in (1, 16, 17, 64):
        whole = torch.randn(rows, 33, dtype=torch.float32).bfloat16()
        weight = torch.randn(17, 33, dtype=torch.float32).bfloat16()
        view = with_gaps(whole)
        assert has_gaps(view) == (rows > 1)
        found = products.linear(view, with_gaps(weight))
        assert torch.equal(found, products.linear(whole, weight))


def test_what_has_no_gaps_is_not_copied() -> None:
    x = torch.zeros(4, 8, 16, dtype=torch.bfloat16)
    for same in (x, x.mT, x[1], x[:, 0, :].contiguous(), x.float()[..., :5]):
        assert products.dense(same) is same
    for view in (x[..., :5], x.transpose(0, 1)):
        assert products.dense(view) is not view
        assert torch.equal(products.dense(view), view)


def test_a_refused_product_is_named() -> None:
    with GapsRefused(), pytest.raises(AssertionError, match=r"reads \(3, 8\)"):
        torch.nn.functional.linear(
            torch.zeros(3, 16, dtype=torch.bfloat16)[:, :8],
            torch.zeros(5, 8, dtype=torch.bfloat16),
        )
