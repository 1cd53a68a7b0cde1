"""Classes on top of a class of vLLM's, found by a path that vLLM can import.

vLLM takes a class by its path. ``vllm_di.vllm.worker.vllm/v1/worker/cpu_worker/CPUWorker`` asks the
module ``vllm_di.vllm.worker`` for an attribute whose name is the path of what it extends.
"""

from __future__ import annotations

import importlib


def path_of(module: str, base: str) -> str:
    """The path of ``module``'s class on top of the class at the dotted path ``base``."""
    return f"{module}.{base.replace('.', '/')}"


def base_of(module: str, name: str) -> type:
    """The class that the attribute ``name`` of ``module`` extends. Raises AttributeError for a name
    that is no path."""
    if "/" not in name:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    path, _, base = name.replace("/", ".").rpartition(".")
    found: type = getattr(importlib.import_module(path), base)
    return found
