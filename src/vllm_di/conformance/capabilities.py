"""Which checks read which capability of a manifest, found in their sources. A claim that no check
reads would be shown and never tested."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from vllm_di.conformance.catalog import CHECKS

FOLDER = Path(__file__).parent
OWNER = "declared"
"""Of a Subject: its capabilities."""


def readers(capability: str) -> list[str]:
    """The checks that read a capability: themselves, through a helper that they import, or through
    a method of the subject."""
    through_subject = _methods_of_subject(capability)
    return [
        check.name
        for check in CHECKS
        if capability in _reads(_check(check.name))
        or any(capability in _reads(helper) for helper in _helpers(_check(check.name)))
        or through_subject & _attributes(_check(check.name))
    ]


def _check(name: str) -> Path:
    return FOLDER / "checks" / f"test_{name}.py"


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _reads(path: Path) -> set[str]:
    """Attributes of ``X.declared`` that a file reads."""
    return _reads_of(_tree(path))


def _reads_of(tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == OWNER
    }


def _attributes(path: Path) -> set[str]:
    return {node.attr for node in ast.walk(_tree(path)) if isinstance(node, ast.Attribute)}


def _helpers(check: Path) -> list[Path]:
    """Modules of the suite that a check imports, except other checks and the subject."""
    names = [n.module or "" for n in ast.walk(_tree(check)) if isinstance(n, ast.ImportFrom)]
    stems = [n.rpartition(".")[2] for n in names if n.startswith("vllm_di.conformance.")]
    files = [FOLDER / f"{stem}.py" for stem in stems if stem not in ("subject", "plugin", "run")]
    return [file for file in files if file.is_file()]


def _methods_of_subject(capability: str) -> set[str]:
    functions = [
        n for n in ast.walk(_tree(FOLDER / "subject.py")) if isinstance(n, ast.FunctionDef)
    ]
    return {function.name for function in functions if capability in _reads_of(function)}
