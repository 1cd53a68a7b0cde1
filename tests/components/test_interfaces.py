"""Every method of an interface has a caller: what nobody calls is a burden to each port."""

from __future__ import annotations

import ast
import inspect
import re
from abc import ABC
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import vllm_di
from vllm_di.components import interfaces

SOURCE = Path(vllm_di.__file__).parent
CHECKS = SOURCE / "conformance"
"""Calls what ports implement because they implement it: not a use."""
SLOT_OF = {"OpTable": "ops", "OpLibrary": "ops", "AttentionBackend": "attention"}
"""Where a slot's name is not that of its interface."""
OF_THE_CONTAINER = ("close",)
"""Called by ``containers/fill.py`` on whatever fills a slot."""
FOR_OTHERS = {
    ("ModelProgram", "caches"): "what moves blocks between workers reads them here, and tests do",
    ("Executor", "collective"): "how a component calls a method that a port's worker adds",
    ("WorkerLauncher", "for_role"): "how an executor of several roles opens each",
}
"""Called by components out of tree: the seam is there for them."""


class Source(NamedTuple):
    text: str
    attributes: frozenset[str]
    """That its code reads, of any object."""
    implements: frozenset[str]
    """Names of the classes that its own are made from."""


@cache
def sources() -> list[Source]:
    """Of the files that may call an interface."""
    bases: dict[str, set[str]] = {}
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(text)))
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        for cls in classes:
            bases[cls.name] = {base.id for base in cls.bases if isinstance(base, ast.Name)}
        if not path.is_relative_to(CHECKS):
            attributes = frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute))
            found.append((path, text, attributes, [cls.name for cls in classes]))
    return [
        Source(text, attributes, frozenset().union(*(_ancestors(name, bases) for name in names)))
        for path, text, attributes, names in found
        if path.parent != Path(interfaces.__file__).parent
    ]


def _ancestors(name: str, bases: Mapping[str, set[str]]) -> set[str]:
    direct = bases.get(name, set())
    return direct.union(*(_ancestors(base, bases) for base in direct))


def has_caller(interface: str, method: str) -> bool:
    """Whether a file that speaks of the interface or of its slot, and does not implement it, reads
    an attribute of this name."""
    snake = re.sub(r"(?<!^)(?=[A-Z])", "_", interface).lower()
    names = "|".join({interface, snake, SLOT_OF.get(interface, snake)})
    speaks = re.compile(rf"\b_?({names})\b")
    return any(
        method in source.attributes
        and interface not in source.implements
        and speaks.search(source.text)
        for source in sources()
    )


METHODS = [
    (name, method)
    for name, cls in vars(interfaces).items()
    if inspect.isclass(cls)
    and issubclass(cls, ABC)
    and cls.__module__.startswith(interfaces.__name__)
    for method, value in vars(cls).items()
    if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    if method not in OF_THE_CONTAINER and (name, method) not in FOR_OTHERS
]


@pytest.mark.parametrize(("interface", "method"), METHODS)
def test_somebody_calls_it(interface: str, method: str) -> None:
    assert has_caller(interface, method), (
        f"{interface}.{method}: nobody in src calls it; each port would implement it for nothing"
    )


@pytest.mark.parametrize("method", ["reduce_scatter", "broadcast", "send", "recv", "barrier"])
def test_a_method_without_a_caller_is_found(method: str) -> None:
    """Some of these are methods of other classes too."""
    assert not has_caller("Communicator", method)
