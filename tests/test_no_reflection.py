"""Meaning is declared, never guessed from how a thing was written: no comparison of methods, of
classes or of what parts say of themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vllm_di

SOURCE = Path(vllm_di.__file__).parent
ALLOWED = {
    "components/attention/paged.py": "which methods a class declares, read where it is declared",
    "components/interfaces/ops.py": "which methods a class declares, read where it is declared",
    "components/remote.py": "which methods a class declares as calls",
    "containers/forms.py": "compares signatures, to refuse the form of older interfaces",
    "containers/schema.py": "signatures are the schema of YAML; names for messages",
    "containers/signatures.py": "signatures are the schema of YAML",
    "conformance/bad_values.py": "values of plain types that a signature refuses",
    "conformance/hygiene.py": "compares a process before and after an import",
    "conformance/probes.py": "makes probes of the chosen classes",
    "kernels/triton/compile.py": "Triton specialises on the types of arguments",
}
NAMES = {"__self__", "__func__", "__wrapped__", "__mro__", "__dict__", "__code__"}


def is_type_of(node: ast.expr) -> bool:
    """``type(x)``, or an attribute of it."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "type"
        and len(node.args) == 1
    )


def describes(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "describe"
    )


def reflections(text: str) -> list[str]:
    """Line and kind of each in a source."""
    found = []
    for node in ast.walk(ast.parse(text)):
        kind = ""
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(map(is_type_of, sides)):
                kind = "compares a type"
            elif any(map(describes, sides)):
                kind = "compares descriptions"
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            kind = node.attr
        elif isinstance(node, ast.Attribute) and node.attr == "unwrap":
            kind = "unwrap"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            kind = "vars" if node.func.id == "vars" else ""
        if kind:
            found.append(f"{getattr(node, 'lineno', 0)}: {kind}")
    return found


FILES = {str(p.relative_to(SOURCE)): p for p in sorted(SOURCE.rglob("*.py"))}


def test_nothing_is_guessed() -> None:
    found = {
        name: lines
        for name, path in FILES.items()
        if (lines := reflections(path.read_text(encoding="utf-8"))) and name not in ALLOWED
    }
    assert found == {}


@pytest.mark.parametrize("name", ALLOWED)
def test_an_exception_is_still_one(name: str) -> None:
    assert reflections(FILES[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "own = type(self).forward is not Paged.forward",
        "if type(owner) is TorchOps: ...",
        "one.describe() == other.describe()",
        "table.linear.__self__",
        "inspect.unwrap(f)",
        "vars(OpLibrary).get(op)",
    ],
)
def test_each_kind_is_found(text: str) -> None:
    assert len(reflections(text)) == 1
