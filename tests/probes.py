"""``tests.probes.X`` for any component class X: the same class, counting its calls.

A node names it as ``_target_: tests.probes.vllm_di__components__attention__sdpa__SdpaAttention``.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm_di.containers.slots import SLOTS

CALLS: Counter[str] = Counter()
"""Slot to the number of calls of its interface's methods, on the probe in that slot."""


def name_of(target: str) -> str:
    """The dotted name of the probe of a class."""
    return f"tests.probes.{target.replace('.', '__')}"


@functools.cache
def __getattr__(name: str) -> type:
    module, _, cls = name.rpartition("__")
    if not module.startswith("vllm_di"):
        raise AttributeError(name)
    return probe(getattr(importlib.import_module(module.replace("__", ".")), cls))


def probe(cls: type) -> type:
    """A subclass that counts."""
    slot, interface = next((s, k) for s, k in SLOTS.items() if issubclass(cls, k))
    names = [n for k in interface.__mro__[:-1] for n in vars(k) if not n.startswith("_")]
    namespace: dict[str, Any] = {"__module__": "tests.probes"}
    for name in names:
        method = getattr(cls, name, None)
        if callable(method) and name != "close":
            namespace[name] = _counted(slot, method)
    return type(f"{cls.__name__}Probe", (cls,), namespace)


def _counted(slot: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        CALLS[slot] += 1
        return method(self, *args, **kwargs)

    return counted
