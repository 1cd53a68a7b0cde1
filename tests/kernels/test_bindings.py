"""The ctypes signatures are those of the C++ sources: a wrong one is memory read at random."""

from __future__ import annotations

import ctypes
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from vllm_di.kernels.bindings import CpuKernels, GroupKernels
from vllm_di.kernels.build import SOURCES

EXPORTED = re.compile(r"^EXPORT\s+([\w ]+?[\s*]+)(\w+)\(([^)]*)\)\s*\{", re.MULTILINE)
C_TYPES = {
    "void": None,
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
}
LEAST = 26
"""Functions that there are today: fewer means that the sources were not read."""


class Signature(NamedTuple):
    arguments: list[Any]
    returns: Any


def c_type(declared: str) -> Any:
    """``const float* x`` -> c_void_p; ``int64_t rows`` -> c_int64."""
    if "*" in declared:
        return ctypes.c_void_p
    return C_TYPES[declared.split()[0]]


def exported() -> dict[str, Signature]:
    found = {}
    for path in sorted(SOURCES.glob("*.cpp")):
        text = path.read_text()
        matches = EXPORTED.findall(text)
        assert len(matches) == len(re.findall(r"^EXPORT\b", text, re.MULTILINE)), path.name
        for returns, name, arguments in matches:
            listed = [part for part in arguments.split(",") if part.strip()]
            found[name] = Signature([c_type(part) for part in listed], c_type(returns))
    return found


class Library:
    """Stands in for a loaded library: every name is a function that keeps what is set on it."""

    def __init__(self) -> None:
        self.functions: dict[str, SimpleNamespace] = {}

    def __getattr__(self, name: str) -> SimpleNamespace:
        return self.functions.setdefault(name, SimpleNamespace())


def bound() -> dict[str, Signature]:
    library = Library()
    CpuKernels(library)  # type: ignore[arg-type]
    GroupKernels(library)  # type: ignore[arg-type]
    return {n: Signature(f.argtypes, f.restype) for n, f in library.functions.items()}


def test_every_exported_function_is_bound_and_no_other() -> None:
    assert set(bound()) == set(exported())
    assert len(exported()) >= LEAST


@pytest.mark.parametrize("name", sorted(exported()))
def test_a_signature_is_that_of_the_source(name: str) -> None:
    assert bound()[name] == exported()[name]
