"""The adapters take what each tested vLLM hands them, by its recorded signatures: read from the
sources, since vLLM is not installed here."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from tests.vllm.environment import VERSIONS
from tests.vllm.record import METHODS, RECORDS

import vllm_di.vllm

SOURCE = Path(vllm_di.vllm.__file__).parent


def method_of(ours: str, name: str) -> ast.FunctionDef:
    file, _, rest = ours.partition(":")
    cls, _, alone = rest.partition(".")
    tree = ast.parse((SOURCE / file).read_text())
    [found] = [
        method
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == cls
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == (alone or name)
    ]
    return found


def refusals(method: ast.FunctionDef, theirs: list[list[Any]]) -> list[str]:
    """Why a call with all of vLLM's parameters, in order or by name, would not fit."""
    names = [a.arg for a in method.args.args][1:]  # without self
    required = names[: len(names) - len(method.args.defaults)]
    takes_more = method.args.vararg is not None or method.args.kwarg is not None
    given = [name for name, _ in theirs]
    found = [f"needs {name}" for name in required if name not in given]
    found += [f"does not take {name}" for name in given if name not in names and not takes_more]
    for place, (own, other) in enumerate(zip(names, given, strict=False)):
        if own != other:
            found.append(f"parameter {place} is {own}, vLLM's {other}")
    return found


def recorded(version: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDS / f"{version}.json").read_text())
    return found


@pytest.mark.parametrize("ours", METHODS)
@pytest.mark.parametrize("version", VERSIONS)
def test_an_adapter_takes_what_vllm_hands_it(version: str, ours: str) -> None:
    for name, theirs in recorded(version)["methods"][ours].items():
        method = method_of(ours, name)
        assert refusals(method, theirs) == [], f"{ours}.{name} in vLLM {version}"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_batch_has_the_fields_that_the_builder_reads(version: str) -> None:
    build = method_of("adapters/attention.py:Builder", "build")
    read = {
        node.attr
        for node in ast.walk(build)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "batch"
    }
    assert len(read) > 5
    assert read <= set(recorded(version)["fields"])


def test_a_call_that_would_not_fit_is_seen() -> None:
    tree = ast.parse("class A:\n def f(self, x, y, z=1): ...").body[0]
    assert isinstance(tree, ast.ClassDef)
    method = tree.body[0]
    assert isinstance(method, ast.FunctionDef)
    assert refusals(method, [["x", False], ["y", False]]) == []
    assert refusals(method, [["x", False]]) == ["needs y"]
    assert refusals(method, [["y", False], ["x", False]])
    assert refusals(method, [["x", False], ["y", False], ["w", True]])
