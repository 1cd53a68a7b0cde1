"""No tensor takes the process's default dtype: a kernel that reads it by its address would read
something else wherever that default was changed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import vllm_di

SOURCES = Path(vllm_di.__file__).parent
FOLDERS = ("components", "kernels", "ports", "models", "containers")
FACTORIES = frozenset(
    {
        *("zeros", "ones", "empty", "full", "tensor", "scalar_tensor", "as_tensor", "asarray"),
        *("arange", "range", "linspace", "logspace", "eye", "rand", "randn", "normal"),
        *("empty_strided", "empty_permuted", "tril_indices", "triu_indices"),
    }
)
UNTYPED = frozenset({"Tensor", "FloatTensor"})
"""Constructors that cannot say a dtype."""


def files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((SOURCES / folder).rglob("*.py"))]


def offences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, the call)."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        if not (isinstance(owner, ast.Name) and owner.id == "torch"):
            continue
        named = {keyword.arg for keyword in node.keywords}
        if node.func.attr in UNTYPED or (node.func.attr in FACTORIES and "dtype" not in named):
            yield node.lineno, ast.unparse(node)


def test_every_factory_states_a_dtype() -> None:
    found = [
        f"{path.relative_to(SOURCES)}:{line}: {call}"
        for path in files()
        for line, call in offences(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


def test_the_walk_sees_what_it_looks_for() -> None:
    wrong = ("torch.zeros(3)", "torch.arange(3, device=d)", "torch.tensor(x)", "torch.Tensor(3)")
    right = ("torch.zeros(3, dtype=t)", "torch.zeros_like(x)", "np.zeros(3)", "x.new_zeros(3)")
    assert all(list(offences(ast.parse(text))) for text in wrong)
    assert not any(list(offences(ast.parse(text))) for text in right)
    assert len(files()) > 100
